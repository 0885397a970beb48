"""A version in one file, to carry into another registry: descriptions of all that it was made from, and its own files.

    bitsmith-export.json        format, name, number, digests of checkpoint, report and signatures, time, note
    artifacts/<digest>.json     descriptions: of these, and of all that they were made from
    blobs/<sha256>              the files of checkpoint, report and signatures

An uncompressed tar, since weights do not shrink; equal versions give equal files. Who reads one trusts no byte of it.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from registry.artifact import OWN_KINDS, Artifact, FileEntry, canonical_json, checked_digest
from registry.errors import IntegrityError, InvalidDescriptionError, RegistryError, TargetExistsError
from registry.partial import remove_stale, temporary_beside
from registry.progress import SILENT, Progress
from registry.registry import Registry
from registry.signing import KIND as SIGNATURE_KIND
from registry.signing import signatures
from registry.store import disk_errors, fsync
from registry.version import Version, checked_name

FORMAT = 1
MOST_DESCRIPTION_BYTES = 64 << 20
_HEAD = "bitsmith-export.json"
_AGAIN = "Nothing was published. Export the version again."
_MEMBER = re.compile(r"(artifacts)/([0-9a-f]{64})\.json|(blobs)/([0-9a-f]{64})")


@dataclass(frozen=True)
class Exported:
    """What `export_version` wrote."""

    version: Version
    path: Path
    num_files: int
    size_bytes: int


def export_version(registry: Registry, reference: str, path: Path, *, progress: Progress = SILENT) -> Exported:
    """Write a version into the new file `path`, whole or not at all; every byte is checked on its way.

    Raises:
        TargetExistsError: `path` exists.
        NotFoundError, IntegrityError: a file of the version is missing or damaged.
    """
    version = registry.version(reference)
    if path.exists():
        raise TargetExistsError(f"{path} exists already. Choose another name, or move it away.")
    signed = signatures(registry, version.digest)
    own = [registry.get(digest) for digest in (version.digest, version.report_digest) if digest] + signed
    described = {each.digest: each for one in own for each in registry.lineage(one.digest).artifacts}
    files = {entry.sha256: entry for artifact in own for entry in artifact.files.values()}
    remove_stale(path.parent)
    with disk_errors(path), temporary_beside(path, root=path.parent) as partial:
        with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
            head = {"format": FORMAT, "version": asdict(version), "signatures": [each.digest for each in signed]}
            _add_text(tar, _HEAD, canonical_json(head))
            for digest, artifact in sorted(described.items()):
                _add_text(tar, f"artifacts/{digest}.json", artifact.to_json())
            for sha256, entry in progress.track(sorted(files.items()), f"export {version}", len(files)):
                registry.store.verify(entry, f"blob {sha256[:12]} of {version}")
                with registry.store.open(sha256) as blob:
                    tar.addfile(_member(f"blobs/{sha256}", entry.size_bytes), blob)
        fsync(partial)
        size_bytes = partial.stat().st_size
        partial.rename(path)
        fsync(path.parent)
    return Exported(version, path, len(files), size_bytes)


def import_version(registry: Registry, path: Path, *, name: str | None = None, progress: Progress = SILENT) -> Version:
    """Take in what `export_version` wrote, and publish it as the next version of `name`.

    The same version again is the version that it already is. Nothing is published unless every file is there and
    right; nothing is written outside the store.

    Args:
        name: the exported one by default.
    Raises:
        RegistryError: `path` cannot be read, or is not such a file.
        IntegrityError: a byte is not what its hash says, or a file is missing.
    """
    checked_name(name or "model")
    with _opened(path) as members, registry.adding():
        head = next(members, None)
        if head is None or head[0] != _HEAD:
            raise _not_ours(path, f"its first member is not {_HEAD}")
        exported, signed = _exported(path, _read(path, *head))
        own = [digest for digest in (exported.digest, exported.report_digest, *signed) if digest]
        artifacts: dict[str, Artifact] = {}
        entries: dict[str, FileEntry] = {}
        received: set[str] = set()
        for member, size_bytes, content in progress.track(members, f"import {path.name}"):
            found = _MEMBER.fullmatch(member)
            if found is None:
                raise _not_ours(path, f"it has a member {member[:80]!r}")
            digest = found[2] or found[4]
            if found[1]:
                artifacts[digest] = _artifact(path, digest, _read(path, member, size_bytes, content))
                if digest in own:
                    entries |= {entry.sha256: entry for entry in artifacts[digest].files.values()}
                continue
            if digest not in entries:
                raise _not_ours(path, f"no description names its blob {digest[:12]}")
            if size_bytes != entries[digest].size_bytes:
                expected = f"{entries[digest].size_bytes} bytes"
                raise IntegrityError(f"blob {digest[:12]} of {path}", expected, f"{size_bytes} bytes", _AGAIN)
            registry.store.receive(content, entries[digest], f"blob {digest[:12]} of {path}")
            received.add(digest)
        if missing := [digest for digest in own if digest not in artifacts] or sorted(entries.keys() - received):
            raise IntegrityError(str(path), "a whole export", f"one without {missing[0][:12]}", _AGAIN)
        for digest, artifact in artifacts.items():
            is_signature = artifact.kind == SIGNATURE_KIND and artifact.parents == (exported.digest,)
            if is_signature != (digest in signed) or (artifact.kind in OWN_KINDS and not is_signature):
                raise _not_ours(path, f"{artifact.kind} {digest[:12]} is none of its version's")
        for digest, artifact in artifacts.items():
            if digest not in own:
                registry.remember(artifact)
        for digest in own:
            registry.record(artifacts[digest])
        report = artifacts[exported.report_digest] if exported.report_digest else None
        note = exported.note or f"exported as {exported}"
        return registry.publish(name or exported.name, artifacts[exported.digest], report, note)


@contextmanager
def _opened(path: Path) -> Iterator[Iterator[tuple[str, int, IO[bytes]]]]:
    """Name, size and content of each member, in order; only plain files are let through."""

    def members(tar: tarfile.TarFile) -> Iterator[tuple[str, int, IO[bytes]]]:
        for member in tar:
            content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
            if content is None:
                raise _not_ours(path, f"{member.name[:80]!r} is no plain file")
            yield member.name, member.size, content

    with disk_errors(path):
        try:
            with tarfile.open(path, "r:") as tar:
                yield members(tar)
        except RegistryError:
            raise
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:  # the latter two of malformed headers
            raise _not_ours(path, str(error)) from error


def _exported(path: Path, content: Any) -> tuple[Version, list[str]]:
    """The version, and the digests of its signatures."""
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        version = Version(**content["version"])
        checked_name(version.name)
        checked_digest(version.digest)
        if version.report_digest is not None:
            checked_digest(version.report_digest)
        if not isinstance(version.note, str):
            raise TypeError(f"its note is {version.note!r}")
        signed = [checked_digest(digest) for digest in content["signatures"]]
    except (KeyError, TypeError, ValueError) as error:
        raise _not_ours(path, f"{_HEAD} is not understood: {error}") from error
    return version, signed


def _artifact(path: Path, digest: str, content: Any) -> Artifact:
    artifact = Artifact.from_json(json.dumps(content))
    if artifact.digest != digest:
        raise IntegrityError(f"artifacts/{digest[:12]}… in {path}", digest, artifact.digest, _AGAIN)
    return artifact


def _read(path: Path, member: str, size_bytes: int, content: IO[bytes]) -> Any:
    if size_bytes > MOST_DESCRIPTION_BYTES:
        raise _not_ours(path, f"{member[:80]!r} has {size_bytes} bytes")
    try:
        return json.loads(content.read())
    except (ValueError, RecursionError) as error:
        raise InvalidDescriptionError(f"{member} in {path} is not JSON ({error}). {_AGAIN}") from error


def _add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    content = text.encode()
    tar.addfile(_member(name, len(content)), io.BytesIO(content))


def _member(name: str, size_bytes: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)  # no time and no owner: equal versions give equal files
    member.size, member.mode = size_bytes, 0o644
    return member


def _not_ours(path: Path, why: str) -> RegistryError:
    return RegistryError(
        f"{path} is not an export of bitsmith, or is damaged: {why}. Nothing was published. Expected a file that "
        "`bitsmith registry export` wrote."
    )
