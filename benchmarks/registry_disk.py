"""Drills of the registry: a disk that fills up in the middle of a command, and a folder that may not be written.

    python -m benchmarks.registry_disk        # as root, for it mounts a small disk in memory

Every command runs with almost no space left, from none to what it needs: it completes, or it is refused with a message
that says so. With space again the same command completes, and `doctor` finds nothing. In a read-only folder what only
reads works, and what would write is refused; afterwards nothing has changed. Exits with 1 where that is not so.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.registry_damage import facts, make_named
from benchmarks.registry_damages import lose_index, record
from registry import Registry, RegistryError, export_version, import_version

DISK_BYTES = 8 << 20
FILE_BYTES = 200_000
ROOMS_BYTES = (0, *range(8192, 320_000, 24_576))  # left free when a command starts
Command = Callable[[], object]


class CannotMountError(Exception):
    """This process may not mount anything."""


@contextmanager
def small_disk(size_bytes: int = DISK_BYTES) -> Iterator[Path]:
    """A folder with so much space and no more. Raises CannotMountError where the system forbids it."""
    folder = Path(tempfile.mkdtemp(prefix="bitsmith-disk-"))
    try:
        _mount("-t", "tmpfs", "-o", f"size={size_bytes},mode=755", "tmpfs", str(folder))
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
    finally:
        folder.rmdir()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody may write below `folder`; root, whom permissions do not stop, gets a read-only mount."""
    if os.geteuid() != 0:
        inside = [path for path in (folder, *folder.rglob("*")) if path.is_dir()]
        for path in inside:
            path.chmod(0o555)
        yield
        for path in inside:
            path.chmod(0o755)
        return
    _mount("--bind", str(folder), str(folder))
    try:
        _mount("-o", "remount,bind,ro", str(folder))
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _mount(*arguments: str) -> None:
    if shutil.which("mount") is None or os.geteuid() != 0:
        raise CannotMountError("A small disk needs root and `mount`.")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotMountError(f"This system does not let root mount: {done.stderr.strip()}")


@dataclass(frozen=True)
class Place:
    """A registry on the small disk, and a folder elsewhere for what commands read."""

    root: Path
    work: Path

    @property
    def registry(self) -> Registry:
        """Opened anew."""
        return Registry(self.root)

    def folder(self, turn: int) -> Path:
        """With a new file."""
        folder = self.work / f"folder{turn}"
        folder.mkdir(exist_ok=True)
        (folder / "file").write_bytes(os.urandom(FILE_BYTES))
        return folder


# What each command is, once prepared with space left


def adding(place: Place, turn: int) -> Command:
    folder = place.folder(turn)
    return lambda: place.registry.add_artifact("checkpoint", folder)


def publishing(place: Place, turn: int) -> Command:
    artifact = place.registry.add_artifact("checkpoint", place.folder(turn))
    return lambda: place.registry.publish(f"model{turn}", artifact)


def moving_an_alias(place: Place, turn: int) -> Command:
    return lambda: place.registry.alias(f"model:{1 + turn % 2}", "other")


def materializing(place: Place, turn: int) -> Command:
    registry = place.registry
    artifact = registry.get(registry.version("large").digest)
    return lambda: registry.materialize(artifact, place.root.parent / f"out{turn}")


def exporting(place: Place, turn: int) -> Command:
    return lambda: export_version(place.registry, "large", place.root.parent / f"out{turn}.tar")


def importing(place: Place, turn: int) -> Command:
    other = Registry(place.work / "other")
    other.publish("imported", other.add_artifact("checkpoint", place.folder(turn)))
    exported = export_version(other, "imported", place.work / f"{turn}.tar").path
    return lambda: import_version(place.registry, exported)


def collecting(place: Place, turn: int) -> Command:
    place.registry.add_artifact("matrices", place.folder(turn))
    return lambda: place.registry.collect_garbage(grace_seconds=-5)


def repairing_a_record(place: Place, turn: int) -> Command:
    record(place.registry, "checkpoint").unlink()
    return lambda: Registry.examine(place.root, repair=True)


def repairing_the_index(place: Place, turn: int) -> Command:
    lose_index(place.registry)
    return lambda: Registry.examine(place.root, repair=True)


def repairing_nothing(place: Place, turn: int) -> Command:
    return lambda: Registry.examine(place.root, repair=True)


COMMANDS = (
    adding,
    publishing,
    moving_an_alias,
    materializing,
    exporting,
    importing,
    collecting,
    repairing_a_record,
    repairing_the_index,
)


WRITING = (adding, publishing, moving_an_alias, importing, collecting, repairing_nothing)


def fill(folder: Path, room_bytes: int) -> Path:
    """A file that leaves so much free."""
    ballast = folder / "ballast"
    free_bytes = shutil.disk_usage(folder).free
    with ballast.open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, max(free_bytes - room_bytes, 4096))
    return ballast


def refusal(command: Command) -> str | None:
    """What the error says; None if the command completes."""
    try:
        command()
    except RegistryError as error:
        return str(error)
    return None


def drill_full(
    disk: Path, work: Path, prepare: Callable[[Place, int], Command], rooms_bytes: Sequence[int] = ROOMS_BYTES
) -> tuple[int, int]:
    """Run a command with each of `rooms_bytes` left; how often it was refused, and completed at once.

    Raises:
        AssertionError: it broke a promise.
    """
    place = Place(disk / "registry", work)
    make_named(place.registry)
    place.registry.publish("large", place.registry.add_artifact("checkpoint", place.folder(-1)))
    num_refused = 0
    for turn, room_bytes in enumerate(rooms_bytes):
        versions = place.registry.versions()
        command = prepare(place, turn)
        ballast = fill(disk, room_bytes)
        why = refusal(command)
        ballast.unlink()
        assert why is None or "disk is full" in why, f"another reason: {why}"
        left = [*disk.rglob("*.partial"), *(place.root / "blobs" / "incoming").iterdir()]
        assert not left, f"half-written: {left}"
        if why is not None:
            num_refused += 1
            command()
        assert set(versions) <= set(place.registry.versions())
        assert Registry.examine(place.root) == [], f"after {room_bytes} bytes were left"
        for path in disk.glob("out*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return num_refused, len(rooms_bytes) - num_refused


def drill_read_only(root: Path, work: Path) -> tuple[int, int]:
    """Run all commands on a registry that may not be written; how many worked, and how many were refused."""
    place = Place(root, work)
    make_named(place.registry)
    place.registry.publish("large", place.registry.add_artifact("checkpoint", place.folder(-1)))
    writing = [prepare(place, number) for number, prepare in enumerate(WRITING)]
    before = facts(place.registry)
    with read_only(root):
        assert facts(place.registry) == before, "it reads something else"
        reading = (
            lambda: place.registry.materialize(place.registry.get(before[0][0].digest), work / "out"),
            lambda: export_version(place.registry, "model", work / "out.tar"),
            lambda: Registry.examine(root),
        )
        for command in reading:
            command()
        for command in writing:
            why = refusal(command) or "not refused"
            assert "read-only" in why or "Access is refused" in why, why
    assert facts(place.registry) == before
    assert Registry.examine(root) == []
    for command in writing:
        command()
    return len(before) + len(reading), len(writing)


def main() -> None:
    """See the module's docstring."""
    try:
        drill_all()
    except CannotMountError as error:
        print(f"disks left out: {error}")


def drill_all() -> int:
    """Every command on a full disk, then all of them in a read-only folder; how many were refused."""
    total_refused = 0
    for prepare in COMMANDS:
        with small_disk() as disk, tempfile.TemporaryDirectory() as work:
            num_refused, num_completed = drill_full(disk, Path(work), prepare)
        name = prepare.__name__.replace("_", " ")
        print(f"disk full while {name}: {num_refused} refused, {num_completed} completed, 0 half-written", flush=True)
        total_refused += num_refused
    with tempfile.TemporaryDirectory() as folder:
        root, work = Path(folder) / "registry", Path(folder) / "work"
        work.mkdir()
        num_read, num_refused = drill_read_only(root, work)
    print(f"read-only folder: {num_read} ways to read work, {num_refused} to write are refused, 0 changes", flush=True)
    return total_refused + num_refused


if __name__ == "__main__":
    main()
