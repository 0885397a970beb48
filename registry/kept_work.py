"""What an unfinished step has written, with hashes: work that is gone on with must be as it was left.

    steps/<key>/.bitsmith-written    a line `sha256 path` for each file, written before the file has its name

A file that is replaced has several lines, of which any may be its own: a kill can come before the new one has the name.
"""

from collections import defaultdict
from pathlib import Path

from registry.store import disk_errors, hash_file

_FILE = ".bitsmith-written"
_MOST_PARENTS = 3  # of a file, up to the folder of its step


def begin(workdir: Path) -> None:
    """From now on what `note` is told of `workdir` is kept."""
    with disk_errors(workdir):
        (workdir / _FILE).touch()


def note(target: Path, written: Path) -> None:
    """What `written` holds will be at `target`; kept where that is in the folder of a step, for `changed`."""
    workdir = next((folder for folder in [*target.parents][:_MOST_PARENTS] if (folder / _FILE).exists()), None)
    if workdir is None:
        return
    line = f"{hash_file(written).sha256} {target.relative_to(workdir).as_posix()}"
    with (workdir / _FILE).open("ab") as file:  # in one call, for others write too
        file.write(f"\n{line}\n".encode())


def changed(workdir: Path) -> Path | None:
    """A file of `workdir` that is not what was written, or None. Raises RegistryError if one cannot be read."""
    expected: dict[str, set[str]] = defaultdict(set)
    with disk_errors(workdir):
        if not (workdir / _FILE).exists():
            return None
        for line in (workdir / _FILE).read_text(encoding="utf-8", errors="replace").splitlines():
            sha256, _, name = line.partition(" ")
            if len(sha256) == 64 and name:  # the last line of a killed process may be cut
                expected[name].add(sha256)
        for name, hashes in expected.items():
            path = workdir / name
            if path.is_file() and hash_file(path).sha256 not in hashes:
                return path
    return None
