"""Files kept once, by the sha256 of their content, in a local folder; with a remote store (remote.py) it is the cache.

    <root>/
        blobs/sha256/ab/abcdef...    one file, read-only (0444), named by its own hash; written once
        blobs/incoming/<random>      a copy under way; what a killed process leaves here is never read

A file reaches its name only by a rename, after its bytes were hashed and are on the disk (fsync). With a remote store
it is there before it is here, and what is here may be deleted: it is fetched again when it is read.
"""

import errno
import hashlib
import math
import os
import secrets
from collections.abc import Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

from registry.artifact import Artifact, FileEntry, checked_digest
from registry.errors import DiskFullError, IntegrityError, NotFoundError, RegistryError, TargetExistsError
from registry.partial import remove_stale, temporary_beside
from registry.paths import checked_path

if TYPE_CHECKING:
    from registry.remote import RemoteBlobs

CHUNK_BYTES = 1 << 20
SYNC_BYTES = 32 << 20  # handed to the disk at once
_FICLONE = 0x40049409  # ioctl of Linux: let two files share their blocks until one is written (btrfs, xfs)


class Store:
    """The blobs of one registry. Any number of processes may add and read at once.

    Every method raises RegistryError, with the path, where the disk is full or refuses access.

    Args:
        remote: keeps them; below `root` are copies then.
    """

    def __init__(self, root: Path, remote: "RemoteBlobs | None" = None) -> None:
        self.remote = remote
        self._blobs = Path(root) / "blobs" / "sha256"
        self._incoming = Path(root) / "blobs" / "incoming"
        with disk_errors(self._blobs):
            self._blobs.mkdir(parents=True, exist_ok=True)
            self._incoming.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where the blob is, fetched if it was not here.

        Raises:
            NotFoundError: it is not there.
            IntegrityError: it is damaged in the remote store.
        """
        path = self._place(sha256)
        if not path.is_file() and self.remote is not None:
            self._fetch(self.remote, sha256)
        if not path.is_file():
            raise NotFoundError(
                f"The blob {sha256[:12]}… is missing from {self._blobs}. It was deleted by hand, or the "
                "registry was restored in part: run the step that made it again, or pull the version again."
            )
        return path

    def open(self, sha256: str) -> BinaryIO:
        """The blob's bytes, for reading."""
        with disk_errors(path := self.path(sha256)):
            return path.open("rb")

    def has(self, entry: FileEntry) -> bool:
        """Is a blob of that name and size there? Its bytes are not read; see `is_sound` and `verify`."""
        try:
            is_here = self._place(entry.sha256).stat().st_size == entry.size_bytes
        except OSError:
            is_here = self.remote is not None
        return is_here and (self.remote is None or self.remote.has(entry))

    def stamp(self, sha256: str) -> tuple[int, ...] | None:
        """Of the blob's file, another one after it was written to; None where it is not here."""
        try:
            found = self._place(sha256).stat()
        except OSError:
            return None
        return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def is_sound(self, entry: FileEntry) -> bool:
        """Is the blob there, and would its bytes be read as they should?"""
        try:
            return self.has(entry) and hash_file(self.path(entry.sha256)) == entry
        except (NotFoundError, IntegrityError):
            return False

    def add(self, path: Path, *, move: bool = False) -> FileEntry:
        """Take in the file at `path` and return its hash and size.

        A blob that is already there is replaced by the same bytes, which also heals a damaged one.

        Args:
            move: the file belongs to the registry and nobody else holds it open: it is renamed, not copied.
        """
        if move:
            entry = hash_file(path)
            self.adopt(path, entry)
            return entry
        with disk_errors(path), self._incoming_path() as copy:
            entry = copy_hashed(path, copy)
            self._install(copy, entry)
        return entry

    def receive(self, content: IO[bytes], entry: FileEntry, what: str) -> None:
        """Take in `entry.size_bytes` bytes of `content`, which must be those that `entry` names.

        Args:
            what: their name for the reader of an error.
        Raises:
            IntegrityError: they are others, or fewer. Nothing was taken in.
        """
        with disk_errors(self._incoming), self._incoming_path() as copy:
            with copy.open("xb") as writer:
                found = _write_hashed(content, writer, entry.size_bytes)
            if found != entry:
                raise IntegrityError(what, f"sha256 {entry.sha256}", f"sha256 {found.sha256}, {found.size_bytes} bytes")
            self._install(copy, entry)

    def adopt(self, path: Path, entry: FileEntry) -> None:
        """Rename `path`, which was just hashed to `entry`, into the store."""
        with disk_errors(path):
            if path.stat().st_nlink > 1 or path.stat().st_dev != self._blobs.stat().st_dev:
                self._adopt_copy(path, entry)
            else:
                fsync(path)
                self._install(path, entry)

    def blobs(self) -> Iterator[Path]:
        """All blobs, each named by its hash."""
        with disk_errors(self._blobs):
            yield from (path for path in self._blobs.glob("??/*") if path.is_file())

    def set_aside(self, sha256: str) -> Path | str:
        """Take a damaged blob out of its name, into blobs/damaged; the next that has the right bytes takes the name."""
        path = self._place(sha256)
        target = self._blobs.parent / "damaged" / sha256
        with disk_errors(path):
            if self.remote is not None:
                path.unlink(missing_ok=True)
                return self.remote.set_aside(sha256)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
        return target

    def unfinished(self) -> Iterator[Path]:
        """Copies under way, and what a killed process left of one."""
        with disk_errors(self._incoming):
            yield from self._incoming.glob("*")

    def verify(self, entry: FileEntry, what: str) -> None:
        """Read the whole blob, in the remote store and in the cache if there are both, and compare it with `entry`.

        Args:
            what: the file's name for the reader of an error.
        Raises:
            NotFoundError: the blob is missing.
            IntegrityError: its size or its bytes differ.
        """
        if self.remote is not None:
            self.remote.verify(entry, what)
            if not self._place(entry.sha256).is_file():
                return
        path = self.path(entry.sha256)
        with disk_errors(path):
            num_bytes = path.stat().st_size
        if num_bytes != entry.size_bytes:
            raise IntegrityError(what, f"{entry.size_bytes} bytes", f"{num_bytes} bytes", HOW_TO_HEAL)
        found = hash_file(path)
        if found != entry:
            raise IntegrityError(what, f"sha256 {entry.sha256}", f"sha256 {found.sha256}", HOW_TO_HEAL)

    def mend(self, entry: FileEntry) -> bool:
        """Let cache and remote store mend each other, where one of the two copies of a blob is sound; was one?"""
        if self.remote is None:
            return False
        cached = self._place(entry.sha256)
        if cached.is_file() and hash_file(cached) == entry:
            self.remote.send(cached, entry)
            return True
        try:
            self._fetch(self.remote, entry.sha256)
        except (NotFoundError, IntegrityError):
            return False
        return True

    def sweep(self, kept: Container[str], oldest: float, *, dry_run: bool) -> tuple[int, int]:
        """Remove blobs that `kept` does not name, and unfinished ones, that nobody changed since `oldest`.

        Args:
            oldest: seconds since 1970.
        Returns:
            number and bytes of what went, or would; of the remote store if there is one, without the copies here.
        """
        gone = self.remote.sweep(kept, oldest, dry_run=dry_run) if self.remote is not None else None
        num_blobs = size_bytes = 0
        for path in [*(blob for blob in self.blobs() if blob.name not in kept), *self.unfinished()]:
            with disk_errors(path), suppress(FileNotFoundError):  # a copy under way that has its name by now
                if path.stat().st_mtime >= oldest:
                    continue
                num_blobs, size_bytes = num_blobs + 1, size_bytes + path.stat().st_size
                if not dry_run:
                    path.unlink()
        return gone or (num_blobs, size_bytes)

    def materialize(self, artifact: Artifact, folder: Path) -> None:
        """Write all files of `artifact` below `folder`, as files of their own that may be edited.

        Blocks are shared with the store where the file system can (reflink), otherwise copied; every byte is
        checked on its way. Files that are there already and the same stay: a call that was killed is repeated.

        Raises:
            TargetExistsError: something else stands where a file should be. Nothing was written.
            UnsafePathError: a path leaves `folder`.
            NotFoundError, IntegrityError: a blob is missing or damaged. What was written is removed.
        """
        targets = {folder / checked_path(path): (path, entry) for path, entry in artifact.files.items()}
        missing = {target: named for target, named in targets.items() if not os.path.lexists(target)}
        for target in targets.keys() - missing.keys():
            if target.is_symlink() or not target.is_file() or hash_file(target) != targets[target][1]:
                raise TargetExistsError(
                    f"{target} exists already with other content, and {artifact.kind} {artifact.digest[:12]} would "
                    "overwrite it. Name an empty folder, or move the file away."
                )
        for place in {folder, *(target.parent for target in targets)}:
            remove_stale(place)
        written: list[Path] = []
        try:
            for target, (path, entry) in missing.items():
                self._write_out(entry, path, target, folder)
                written.append(target)
        except BaseException:
            for target in written:  # else the same call would be refused for them
                target.unlink(missing_ok=True)
            raise

    def _write_out(self, entry: FileEntry, path: str, target: Path, folder: Path) -> None:
        blob = self.path(entry.sha256)
        with disk_errors(target), temporary_beside(target, root=folder) as partial:
            found = copy_hashed(blob, partial)
            if found != entry:
                raise IntegrityError(path, f"sha256 {entry.sha256}", f"sha256 {found.sha256}", HOW_TO_HEAL)
            os.replace(partial, target)

    def _place(self, sha256: str) -> Path:
        return self._blobs / checked_digest(sha256)[:2] / sha256

    @contextmanager
    def _incoming_path(self) -> Iterator[Path]:
        path = self._incoming / secrets.token_hex(16)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _adopt_copy(self, path: Path, entry: FileEntry) -> None:
        with self._incoming_path() as copy:
            if (found := copy_hashed(path, copy)) != entry:
                raise IntegrityError(str(path), entry.sha256, found.sha256, "It changed while it was added.")
            self._install(copy, entry)
        path.unlink()

    def _fetch(self, remote: "RemoteBlobs", sha256: str) -> None:
        with self._incoming_path() as copy:
            remote.fetch(sha256, copy)
            found = hash_file(copy)
            if found.sha256 != sha256:
                got = f"sha256 {found.sha256}, {found.size_bytes} bytes"
                raise IntegrityError(f"{remote.url}, blob {sha256[:12]},", f"sha256 {sha256}", got, HOW_TO_HEAL)
            with disk_errors(copy):
                fsync(copy)
                self._rename(copy, found)

    def _install(self, path: Path, entry: FileEntry) -> None:
        if self.remote is not None:
            self.remote.add(path, entry)
        self._rename(path, entry)

    def _rename(self, path: Path, entry: FileEntry) -> None:
        place = self._place(entry.sha256)
        place.parent.mkdir(exist_ok=True)
        path.chmod(0o444)
        os.replace(path, place)
        fsync(place.parent)


HOW_TO_HEAL = "Run the step that made it again, or pull the version again: the same bytes will replace it."


def hash_file(path: Path) -> FileEntry:
    """sha256 and size of a file."""
    with disk_errors(path), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileEntry(digest.hexdigest(), file.tell())


def copy_hashed(source: Path, target: Path) -> FileEntry:
    """Copy `source` to `target`, a name of ours, on the disk when this returns, and hash what was written."""
    with source.open("rb") as reader, target.open("wb+") as writer:
        if not _reflink(reader, writer):
            return _write_hashed(reader, writer)
        digest = hashlib.file_digest(writer, "sha256")
        os.fsync(writer.fileno())
        return FileEntry(digest.hexdigest(), writer.tell())


def _write_hashed(reader: IO[bytes], writer: BinaryIO, most_bytes: float = math.inf) -> FileEntry:
    """Copy up to `most_bytes`, on the disk when this returns, and hash them; the disk works while more is hashed."""
    digest, num_bytes, num_synced = hashlib.sha256(), 0, 0
    with ThreadPoolExecutor(1) as disk:
        under_way: Future[None] | None = None
        while chunk := reader.read(int(min(CHUNK_BYTES, most_bytes - num_bytes))):
            digest.update(chunk)
            writer.write(chunk)
            num_bytes += len(chunk)
            if num_bytes - num_synced >= SYNC_BYTES and (under_way is None or under_way.done()):
                if under_way is not None:
                    under_way.result()  # the system tells of an error once, here and not at the end
                writer.flush()
                under_way, num_synced = disk.submit(os.fsync, writer.fileno()), num_bytes
        if under_way is not None:
            under_way.result()
    writer.flush()
    os.fsync(writer.fileno())
    return FileEntry(digest.hexdigest(), num_bytes)


def _reflink(reader: BinaryIO, writer: BinaryIO) -> bool:
    """Try to make `writer` share the blocks of `reader`; False where the system cannot."""
    try:
        import fcntl

        fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
    except (ImportError, OSError):
        return False
    return True


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all, also after a power cut."""
    with disk_errors(path), temporary_beside(path, root=path.parent) as partial:
        partial.write_text(text, encoding="utf-8")
        fsync(partial)
        os.replace(partial, path)
        fsync(path.parent)


def fsync(path: Path) -> None:
    """Wait until the file, or the names in the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about `path` into a RegistryError that says what to do."""
    try:
        yield
    except RegistryError:
        raise
    except OSError as error:
        raise disk_error(error, path) from error


def disk_error(error: OSError, path: Path) -> RegistryError:
    """The RegistryError for what the operating system said about `path`."""
    kind = RegistryError
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        kind, advice = DiskFullError, "The disk is full: free some space, or point BITSMITH_HOME at a larger disk."
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "Access is refused: mend the permissions of the folder, or choose another with BITSMITH_HOME."
    else:
        advice = "Check the disk and the path, then run the command again."
    place = error.filename or path
    return kind(f"{place} cannot be read or written ({error.strerror or error}). {advice}")
