"""The blobs of a registry at any URL that fsspec knows, such as s3://bucket/prefix, for one host or several.

    <url>/index                     names the index that decides what is garbage here; a second one is refused
    <url>/sha256/ab/abcdef...       one blob, named by its own hash
    <url>/incoming/<random>         one on its way; what a killed process leaves here is never read
    <url>/damaged/abcdef...         set aside by `doctor`

A blob reaches its name by a move, or by a copy where the server has no folders, after it was read back and hashed. The
server keeps and fsyncs it as it does everything; on a local or mounted disk (file://) that is done here.
"""

import hashlib
import posixpath
import secrets
import shutil
from base64 import b64decode
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from registry.artifact import FileEntry, checked_digest
from registry.errors import IntegrityError, NotFoundError, RegistryError
from registry.settings import RegistrySettings
from registry.store import CHUNK_BYTES, HOW_TO_HEAL, fsync

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MOST_BYTES_OF_A_COPY = 1 << 30  # more is copied in parts, so that no answer takes a minute; S3 has no hash of it then
# Who reads hashes what came: the client's own check would make an unreachable server of a damaged blob. Its standard
# way to try again, and the file system's around it, then give up a server that is silent after a minute and a half.
# It writes into what it is given, hence the copies.
_OPTIONS_OF_S3 = {"config_kwargs": {"response_checksum_validation": "when_required", "retries": {"mode": "standard"}}}
_TRIES_OF_S3 = 2


class RemoteBlobs:
    """The blobs below `url`. Every method raises RegistryError, naming it, where network, server or rights refuse."""

    def __init__(self, url: str) -> None:
        self.url = _checked(url)
        self._is_claimed = False

    def claim(self, index: str) -> bool:
        """Make the store, or find it made for the same index, and writable; whether it was made now.

        Raises:
            RegistryError: it is another's.
        """
        with self._opened() as (fs, root):
            place, probe = f"{root}/index", f"{root}/incoming/{secrets.token_hex(16)}"
            _make_folder(fs, probe)
            fs.pipe_file(probe, b"")
            fs.rm_file(probe)
            is_new = not fs.exists(place)
            if is_new:
                fs.pipe_file(place, f"{index}\n".encode())
            found = fs.cat_file(place).decode(errors="replace").strip()
        if found != index:
            raise RegistryError(
                f"The store {self.url} belongs to another registry, whose index is {found}. Two indexes would collect "
                "each other's files: choose another prefix, share that index with --database, or delete "
                f"{self.url}/index if that registry is gone."
            )
        return is_new

    def give_up(self) -> None:
        """Undo a claim that made the store."""
        with self._opened() as (fs, root):
            fs.rm_file(f"{root}/index")

    def has(self, entry: FileEntry) -> bool:
        """Is a blob of that name and size there? Its bytes are not read; see `verify`."""
        with self._opened() as (fs, root):
            return self._size_bytes(fs, root, _place(root, entry.sha256)) == entry.size_bytes

    def add(self, path: Path, entry: FileEntry) -> None:
        """Send the file at `path`, which was just hashed to `entry`, unless the same bytes are there.

        Raises:
            IntegrityError: other bytes arrived, and got no name.
        """
        with self._opened() as (fs, root):
            place = _place(root, entry.sha256)
            is_there = self._size_bytes(fs, root, place) == entry.size_bytes
            if is_there and (_sha256_by_server(fs, place) == entry.sha256 or _sha256(fs, place) == entry.sha256):
                return
        self.send(path, entry)

    def send(self, path: Path, entry: FileEntry) -> None:
        """Send it whatever is there; else as `add`."""
        with self._opened() as (fs, root):
            incoming = f"{root}/incoming/{secrets.token_hex(16)}"
            try:
                _make_folder(fs, incoming)
                fs.put_file(str(path), incoming)
                if (found := _sha256(fs, incoming)) != entry.sha256:
                    raise IntegrityError(str(path), entry.sha256, f"{found} at {self.url}", "Run the command again.")
                _move(fs, incoming, _place(root, entry.sha256), entry.size_bytes)
            except BaseException:
                with suppress(Exception):  # the collection removes what cannot be removed now
                    fs.rm_file(incoming)
                raise

    def fetch(self, sha256: str, target: Path) -> None:
        """Write the blob to the new file `target`, unchecked. Raises NotFoundError."""
        with self._opened() as (fs, root):
            place = _place(root, sha256)
            if self._size_bytes(fs, root, place) is None:
                raise self._missing(sha256)
            with fs.open(place, "rb") as reader, target.open("xb") as writer:
                shutil.copyfileobj(reader, writer, CHUNK_BYTES)

    def verify(self, entry: FileEntry, what: str) -> None:
        """Read the whole blob and compare it with `entry`; see `Store.verify`."""
        with self._opened() as (fs, root):
            place = _place(root, entry.sha256)
            size_bytes = self._size_bytes(fs, root, place)
            if size_bytes is None:
                raise self._missing(entry.sha256)
            if size_bytes != entry.size_bytes:
                got = f"{size_bytes} bytes at {self.url}"
                raise IntegrityError(what, f"{entry.size_bytes} bytes", got, HOW_TO_HEAL)
            if (found := _sha256(fs, place)) != entry.sha256:
                raise IntegrityError(what, f"sha256 {entry.sha256}", f"sha256 {found} at {self.url}", HOW_TO_HEAL)

    def set_aside(self, sha256: str) -> str:
        """Take a damaged blob out of its name; its URL now."""
        with self._opened() as (fs, root):
            _move(fs, _place(root, sha256), f"{root}/damaged/{sha256}", MOST_BYTES_OF_A_COPY)
        return f"{self.url}/damaged/{sha256}"

    def sweep(self, kept: Container[str], oldest: float, *, dry_run: bool) -> tuple[int, int]:
        """Remove what `kept` does not name and nobody changed since; see `Store.sweep`."""
        num_blobs = size_bytes = 0
        with self._opened() as (fs, root):
            for folder in ("sha256", "incoming"):
                for place, info in fs.find(f"{root}/{folder}", detail=True).items():
                    if posixpath.basename(place) in kept:
                        continue
                    with suppress(FileNotFoundError):  # on its way when it was listed, and in its place by now
                        if _seconds(fs.modified(place)) >= oldest:
                            continue
                        if not dry_run:
                            fs.rm_file(place)
                        num_blobs, size_bytes = num_blobs + 1, size_bytes + info["size"]
        return num_blobs, size_bytes

    @contextmanager
    def _opened(self) -> Iterator[tuple["AbstractFileSystem", str]]:
        """The file system, which is cached for a thread and remade after a fork, and the place of `url` in it."""
        try:
            from fsspec.core import url_to_fs

            is_s3 = self.url.partition("://")[0] in ("s3", "s3a")
            fs, root = url_to_fs(self.url, use_listings_cache=False, **(deepcopy(_OPTIONS_OF_S3) if is_s3 else {}))
            if is_s3:
                fs.retries = _TRIES_OF_S3
            yield fs, root.rstrip("/")
        except RegistryError:
            raise
        except ImportError as error:
            package = getattr(error.__cause__, "name", None) or error.name
            command = "'bitsmith[s3]'" if package == "s3fs" else package
            raise RegistryError(
                f"The registry's store {self.url} needs {package}. Install it with `pip install {command}`."
            ) from error
        except Exception as error:  # each file system raises what its own library does
            cause = " ".join(str(error).split()) or type(error).__name__
            raise RegistryError(
                f"The registry's store {self.url} cannot be used ({cause}). Check the network, "
                "the credentials in the environment (for S3: AWS_ACCESS_KEY_ID or AWS_PROFILE, and AWS_ENDPOINT_URL), "
                "that the bucket or folder is there and that no disk is full; then run the command again."
            ) from error

    def _size_bytes(self, fs: "AbstractFileSystem", root: str, place: str) -> int | None:
        """None where nothing is. Raises RegistryError where not even the store is: then nothing is lost."""
        try:
            return int(fs.info(place)["size"])
        except FileNotFoundError:
            if not self._is_claimed and not fs.exists(f"{root}/index"):
                raise RegistryError(
                    f"There is no store at {self.url}: the bucket is missing, the disk is not mounted, or it was never "
                    f"made. Mend that, or make it with `bitsmith registry init --store {self.url}`."
                ) from None
            self._is_claimed = True
            return None

    def _missing(self, sha256: str) -> NotFoundError:
        return NotFoundError(
            f"The blob {sha256[:12]}… is missing from {self.url}. It was deleted by hand, or collected by a registry "
            "of another index: run the step that made it again, or pull the version again."
        )


def remote_blobs(root: Path) -> RemoteBlobs | None:
    """Where the registry in `root` keeps its blobs, if registry.toml names a URL."""
    url = RegistrySettings.read(root).store
    return None if url is None else RemoteBlobs(url)


def _checked(url: str) -> str:
    scheme, _, rest = url.partition("://")
    if not scheme or not rest.strip("/") or "::" in url:
        raise RegistryError(
            "The registry's store must be given as a URL such as s3://bucket/prefix or file:///mnt/folder, without "
            "`::`. Mend --store or registry.toml."
        )
    if ":" in rest.rpartition("@")[0]:
        raise RegistryError(
            f"The URL of the registry's store, {scheme}://…, holds a password, which registry.toml would show. Leave "
            "it out: it belongs into the environment (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or ~/.aws."
        )
    return url.rstrip("/")


def _place(root: str, sha256: str) -> str:
    return f"{root}/sha256/{checked_digest(sha256)[:2]}/{sha256}"


def _make_folder(fs: "AbstractFileSystem", place: str) -> None:
    """For a file at `place`. A path that does not begin with / begins with a bucket, which is not ours to make."""
    if place.startswith("/"):
        fs.makedirs(posixpath.dirname(place), exist_ok=True)


def _move(fs: "AbstractFileSystem", source: str, target: str, size_bytes: int) -> None:
    _make_folder(fs, target)
    if "file" in fs.protocol:
        fsync(Path(source))
        fs.mv(source, target)
        fsync(Path(target).parent)
    elif "s3" in fs.protocol and size_bytes < MOST_BYTES_OF_A_COPY:
        (from_bucket, from_key, _), (bucket, key, _) = fs.split_path(source), fs.split_path(target)
        origin = {"Bucket": from_bucket, "Key": from_key}
        # the server hashes what it copies; see below
        fs.call_s3("copy_object", Bucket=bucket, Key=key, CopySource=origin, ChecksumAlgorithm="SHA256")
        fs.rm_file(source)
    else:
        fs.mv(source, target)


def _sha256_by_server(fs: "AbstractFileSystem", place: str) -> str | None:
    """What an S3 server found when `_move` let it hash the blob; None, or another, where it was copied otherwise."""
    if "s3" not in fs.protocol:
        return None
    bucket, key, _ = fs.split_path(place)
    found = fs.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED").get("ChecksumSHA256")
    return b64decode(found.partition("-")[0]).hex() if found else None


def _sha256(fs: "AbstractFileSystem", place: str) -> str:
    with fs.open(place, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seconds(moment: datetime) -> float:
    """Since 1970; a server that tells no zone means UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
