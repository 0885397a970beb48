"""Steps: work whose result is kept under the sha256 of all that decides it, so that it is never done twice.

steps/<key>/         the work of a step under way: whatever `build` keeps there survives a kill (kept_work.py)
    out/             what the step will hand over, but for `.*.tmp`: files that a killed process was writing
    sealed.json      written once `out/` is complete and hashed; from then on `build` is not called again
steps/<key>.lock     held by the process that builds
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry import kept_work
from registry.artifact import Artifact, FileEntry
from registry.errors import IntegrityError, InvalidDescriptionError, UnsafePathError
from registry.files import files_below
from registry.index import Index, step_key
from registry.lock import exclusive
from registry.progress import SILENT, Progress
from registry.store import Store, disk_errors, fsync, hash_file, write_atomically
from registry.uses import Uses

REHASH_LIMIT_BYTES = 64 << 20
LONG_READ_BYTES = 4 << 30  # some seconds, which are announced

Settings = Mapping[str, Any]
Build = Callable[[Path], Settings | None]


@dataclass(frozen=True)
class Steps:
    """The steps of one registry, in `folder`.

    Attributes:
        uses: of this process; what it made or found is kept for it.
    """

    folder: Path
    store: Store
    index: Index
    uses: Uses
    _read: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, compare=False, repr=False)
    # sha256 -> the stamp of its file when all of it was read

    def run(
        self, kind: str, parents: Iterable[str], settings: Settings, build: Build, *, resume: bool, progress: Progress
    ) -> Artifact:
        """See `Registry.step`."""
        parents = tuple(parents)
        key = step_key(kind, parents, settings)
        with self.index.database.keeping():
            self.uses.add(*parents)
        if resume and (artifact := self._taken(key, progress)):
            return artifact
        workdir = self.folder / key
        with disk_errors(workdir):
            workdir.parent.mkdir(exist_ok=True)

        def say_waiting() -> None:
            progress.say(f"Another process is working on this {kind} step; waiting for its result.")

        with exclusive(workdir.with_name(f"{key}.lock"), say_waiting):
            if not resume:
                self.index.forget_step(key)
                _remove(workdir)
            elif artifact := self._taken(key, progress):  # made while we waited
                return artifact
            artifact = self._sealed(workdir)
            if artifact is None:
                if path := kept_work.changed(workdir):
                    progress.say(
                        f"The unfinished {kind} step is not as it was left ({path} has changed): it begins anew."
                    )
                    _remove(workdir)
                artifact = _seal(workdir, kind, parents, settings, build)
            with self.index.database.keeping():
                self._take_in(artifact, workdir / "out")
                self.index.record_step(key, artifact)
                self.uses.add(artifact.digest)
            _remove(workdir)
        return artifact

    def find(self, kind: str, parents: Iterable[str], settings: Settings) -> Artifact | None:
        """See `Registry.has_step`."""
        return self._finished(step_key(kind, tuple(parents), settings), whole=False, progress=SILENT)

    def reuse(
        self, kind: str, parents: Iterable[str], settings: Settings, *, is_noted: bool, progress: Progress
    ) -> Artifact | None:
        """See `Registry.finished_step`."""
        key = step_key(kind, tuple(parents), settings)
        return self._taken(key, progress) if is_noted else self._finished(key, whole=True, progress=progress)

    def work_bytes(self, kind: str, parents: Iterable[str], settings: Settings) -> int:
        """See `Registry.step_work_bytes`."""
        total = 0
        for path in (self.folder / step_key(kind, tuple(parents), settings)).rglob("*"):
            with suppress(FileNotFoundError):  # another process may be at work there
                total += path.stat().st_size * path.is_file()
        return total

    def keep(self, key: str, artifact: Artifact) -> bool:
        """Note that the result is used, so that nobody collects it; False if somebody just has."""
        with self.index.database.keeping():
            if self.index.step_result(key) != artifact:
                return False
            self.uses.add(artifact.digest)
            self.index.touch([artifact.digest])
        return True

    def _taken(self, key: str, progress: Progress) -> Artifact | None:
        """The recorded result, read and noted as used."""
        found = self._finished(key, whole=True, progress=progress)
        return found if found is not None and self.keep(key, found) else None

    def _finished(self, key: str, *, whole: bool, progress: Progress) -> Artifact | None:
        """The recorded result, if its blobs are sound."""
        artifact = self.index.step_result(key)
        if artifact is None:
            return None
        unread = sum(entry.size_bytes for entry in artifact.files.values() if whole and not self._was_read(entry))
        if unread > LONG_READ_BYTES:
            progress.say(f"Reading {unread / 1e9:,.1f} GB of {artifact.kind} that are there already: are they whole?")
        return artifact if all(self._is_sound(entry, whole=whole) for entry in artifact.files.values()) else None

    def _is_sound(self, entry: FileEntry, *, whole: bool) -> bool:
        """Small files are hashed (a fraction of a second each), larger ones where `whole` asks for it, and once.

        What is only in a remote store is hashed when it is fetched; it mends what is damaged here.
        """
        if entry.size_bytes <= REHASH_LIMIT_BYTES:
            return self.store.is_sound(entry) or self.store.mend(entry)
        stamp = self.store.stamp(entry.sha256)
        if not whole or stamp is None or self._was_read(entry):
            return self.store.has(entry)
        if not self.store.is_sound(entry):
            return self.store.mend(entry)
        self._read[entry.sha256] = stamp
        return True

    def _was_read(self, entry: FileEntry) -> bool:
        """And has not changed since; small ones are read each time."""
        stamp = self.store.stamp(entry.sha256)
        return stamp is None or self._read.get(entry.sha256) == stamp

    def _sealed(self, workdir: Path) -> Artifact | None:
        """What an earlier process had finished building but not yet taken in; None starts or continues it."""
        seal = workdir / "sealed.json"
        if not seal.exists():
            return None
        try:
            artifact = Artifact.from_json(seal.read_bytes())
        except (InvalidDescriptionError, UnsafePathError, IntegrityError):
            artifact = None
        if artifact is not None and all(
            self._is_at_hand(workdir / "out" / path, entry) for path, entry in artifact.files.items()
        ):
            return artifact
        _remove(workdir)
        return None

    def _is_at_hand(self, path: Path, entry: FileEntry) -> bool:
        """Is the file still in the work folder, or already in the store?"""
        return hash_file(path) == entry if path.is_file() else self._is_sound(entry, whole=True)

    def _take_in(self, artifact: Artifact, out: Path) -> None:
        for path, entry in artifact.files.items():
            if (out / path).exists():
                self.store.adopt(out / path, entry)


def _seal(workdir: Path, kind: str, parents: tuple[str, ...], settings: Settings, build: Build) -> Artifact:
    """Run `build`, hash what it left, and note that it is done."""
    with disk_errors(workdir):
        workdir.mkdir(exist_ok=True)
    kept_work.begin(workdir)
    facts = build(workdir)
    out = workdir / "out"
    with disk_errors(out):
        for unfinished in out.glob("**/.*.tmp"):
            unfinished.unlink()
    files = {}
    for path in files_below(out):
        with disk_errors(out / path):
            files[path] = hash_file(out / path)
            fsync(out / path)
    artifact = Artifact.create(kind, files, parents, {**(facts or {}), "settings": settings})
    write_atomically(workdir / "sealed.json", artifact.to_json())
    return artifact


def _remove(workdir: Path) -> None:
    with disk_errors(workdir):
        if workdir.exists():
            shutil.rmtree(workdir)
