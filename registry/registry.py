"""The registry: results that are never made twice, and versions that never change.

<root>/
    index.sqlite     names, versions, lineage, finished steps (index.py)
    blobs/           every file once, by its hash (store.py)
    steps/<key>/     the work of a step under way: whatever `build` keeps there survives a kill
        out/             what the step will hand over
        sealed.json      written once `out/` is complete and hashed; from then on `build` is not called again
    steps/<key>.lock held by the process that builds
    pulls/           downloads under way (hub.py)
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.artifact import Artifact, FileEntry, checked_path, sha256_of
from registry.errors import (
    AmbiguousDigestError,
    IntegrityError,
    InvalidDescriptionError,
    NotFoundError,
    RegistryError,
    UnsafePathError,
)
from registry.lock import exclusive
from registry.progress import SILENT, Progress
from registry.store import Store, disk_errors, fsync, hash_file, write_atomically
from registry.version import Version, VersionReference, checked_name

if TYPE_CHECKING:
    from registry.index import Index

REHASH_LIMIT_BYTES = 64 << 20

Settings = Mapping[str, Any]
Build = Callable[[Path], Settings | None]


@dataclass(frozen=True)
class Lineage:
    """An artifact and all that it was made from, nearest first; `missing` are digests not known here."""

    artifacts: tuple[Artifact, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Verification:
    """What re-hashing every file of a version found.

    Attributes:
        missing: paths whose blob is gone.
        damaged: path -> the error that says what was expected and what is there.
        num_files, size_bytes: of the whole version, damaged or not.
    """

    version: Version
    missing: tuple[str, ...]
    damaged: Mapping[str, IntegrityError]
    num_files: int
    size_bytes: int

    @property
    def ok(self) -> bool:
        return not self.missing and not self.damaged

    def raise_if_damaged(self) -> None:
        """Raises IntegrityError naming every file that is missing or damaged."""
        if self.ok:
            return
        bad = [f"{path} (missing)" for path in self.missing] + [f"{path} (changed)" for path in self.damaged]
        first = next(iter(self.damaged.values()), None)
        raise IntegrityError(
            f"{self.version}: {', '.join(bad)}",
            first.expected if first else f"all {self.num_files} files",
            first.got if first else f"{self.num_files - len(self.missing)} of them",
            "Pull the version again, or run the command that made it again.",
        )


class Registry:
    """A folder with everything that was made. Any number of processes may use it at once.

    Raises:
        RegistryError: the folder cannot be made or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.store = Store(self.root)

    @cached_property
    def _index(self) -> "Index":
        from registry.index import Index  # SQLAlchemy takes a quarter of a second to import

        return Index(self.root / "index.sqlite")

    # Artifacts

    def add_artifact(
        self,
        kind: str,
        folder: Path,
        parents: Iterable[str] = (),
        metadata: Settings | None = None,
        *,
        move: bool = False,
    ) -> Artifact:
        """Take in every file below `folder`.

        Args:
            parents: digests of the artifacts that it was made from.
            metadata: plain JSON values; no time and no host, so that equal work has an equal name.
            move: `folder` belongs to the registry; its files are renamed into the store.
        Raises:
            RegistryError: `folder` is missing, empty, or holds a link or a special file.
            UnsafePathError: a file name that not every system can hold.
        """
        files = {path: self.store.add(folder / path, move=move) for path in _files_below(folder)}
        artifact = Artifact.create(kind, files, parents, metadata)
        self._index.add_artifact(artifact)
        return artifact

    def record(self, artifact: Artifact) -> None:
        """Enter an artifact whose blobs are all in the store. Raises NotFoundError naming one that is not."""
        for path, entry in artifact.files.items():
            if not self.store.has(entry):
                raise NotFoundError(f"{path} of {artifact.kind} {artifact.digest[:12]} is not in the store.")
        self._index.add_artifact(artifact)

    def get(self, digest: str) -> Artifact:
        """The artifact of that full digest. Raises NotFoundError."""
        artifact = self._index.artifact(digest)
        if artifact is None:
            raise NotFoundError.among("artifact", digest, self._index.digests(), "Digests have 64 hex digits.")
        return artifact

    def find(self, prefix: str) -> Artifact:
        """The one artifact whose digest starts with `prefix`.

        Raises:
            NotFoundError: there is none.
            AmbiguousDigestError: there are several.
        """
        matches = self._index.digests(prefix)
        if len(matches) > 1:
            raise AmbiguousDigestError(
                f"{len(matches)} artifacts start with {prefix!r}: {', '.join(m[:16] for m in matches[:5])}. "
                "Give more digits."
            )
        return self.get(matches[0] if matches else prefix)

    def path(self, artifact: Artifact, relative: str) -> Path:
        """The read-only blob of one file of `artifact`; its name has no suffix. Raises NotFoundError."""
        entry = artifact.files.get(relative)
        if entry is None:
            noun = f"file of {artifact.kind} {artifact.digest[:12]}"
            raise NotFoundError.among(noun, relative, artifact.files, "")
        return self.store.path(entry.sha256)

    def materialize(self, artifact: Artifact, folder: Path) -> None:
        """Write the files of `artifact` below `folder`; see `Store.materialize`."""
        self.store.materialize(artifact, Path(folder))

    def lineage(self, digest: str) -> Lineage:
        """The artifact and all its ancestors. Raises NotFoundError if `digest` itself is unknown."""
        self.get(digest)
        known, missing = [], []
        for ancestor in self._index.ancestors(digest):
            artifact = self._index.artifact(ancestor)
            if artifact is None:
                missing.append(ancestor)
            else:
                known.append(artifact)
        return Lineage(tuple(known), tuple(missing))

    # Versions

    def publish(self, name: str, artifact: Artifact, report: Artifact | None = None, note: str = "") -> Version:
        """Give `artifact` the next version number under `name`.

        The same artifact under the same name again is the version that it already is, with its first report
        and note.

        Raises:
            InvalidNameError: `name` is malformed.
            NotFoundError: `artifact` or `report` is not in this registry.
        """
        checked_name(name)
        self.get(artifact.digest)
        if report is not None:
            self.get(report.digest)
        return self._index.add_version(name, artifact.digest, report.digest if report else None, note)

    def version(self, reference: str) -> Version:
        """The version that "name:3" names, or the latest of "name".

        Raises:
            NotFoundError: names the versions that are there, or the nearest names.
            InvalidNameError: `reference` is malformed.
        """
        wanted = VersionReference.parse(reference)
        version = self._index.version(wanted.name, wanted.number)
        if version is not None:
            return version
        everything = self.versions()
        advice = "`bitsmith registry list` shows all."
        if mine := [str(version) for version in everything if version.name == wanted.name]:
            raise NotFoundError.among("version", reference, mine, advice)
        raise NotFoundError.among("model", wanted.name, (version.name for version in everything), advice)

    def versions(self) -> list[Version]:
        """All versions, by name and number."""
        return self._index.versions()

    def verify(self, reference: str, *, progress: Progress = SILENT) -> Verification:
        """Re-hash every file of a version. What is wrong is in the result; nothing is raised for it."""
        version = self.version(reference)
        artifact = self.get(version.digest)
        missing: list[str] = []
        damaged: dict[str, IntegrityError] = {}
        for path, entry in progress.track(artifact.files.items(), f"verify {version}", len(artifact.files)):
            try:
                self.store.verify(entry, path)
            except NotFoundError:
                missing.append(path)
            except IntegrityError as error:
                damaged[path] = error
        return Verification(version, tuple(missing), damaged, len(artifact.files), artifact.size_bytes)

    # Steps

    def step(
        self,
        kind: str,
        parents: Iterable[str],
        settings: Settings,
        build: Build,
        *,
        resume: bool = True,
        progress: Progress = SILENT,
    ) -> Artifact:
        """The result of `build`, which runs only if nobody has made it before.

        `build(workdir)` leaves its result in `workdir/"out"`. Whatever else it keeps in `workdir` is there
        again after an exception or a kill, until the step succeeds. It may return facts about the result,
        which become metadata beside `settings`. The work folder belongs to one (kind, parents, settings).

        Two processes never build one step at once: the second says that it waits, then finds the result.

        Args:
            kind: of the artifact, part of the key.
            parents: digests, in an order that means something to `build`.
            settings: plain JSON values, everything else that decides the result.
            resume: False forgets the recorded result and the half-done work first.
        Raises:
            RegistryError: `build` left nothing in "out", or the disk refuses.
            TypeError: `settings` or the facts are not plain JSON.
        """
        parents = tuple(parents)
        key = _step_key(kind, parents, settings)
        if resume and (artifact := self._finished(key)):
            return artifact
        workdir = self.root / "steps" / key
        with disk_errors(workdir):
            workdir.parent.mkdir(exist_ok=True)

        def say_waiting() -> None:
            progress.say(f"Another process is working on this {kind} step; waiting for its result.")

        with exclusive(workdir.with_name(f"{key}.lock"), say_waiting):
            if not resume:
                self._index.forget_step(key)
                _remove(workdir)
            elif artifact := self._finished(key):  # made while we waited
                return artifact
            artifact = self._sealed(workdir) or _seal(workdir, kind, parents, settings, build)
            self._take_in(artifact, workdir / "out")
            self._index.record_step(key, artifact)
            _remove(workdir)
        return artifact

    def has_step(self, kind: str, parents: Iterable[str], settings: Settings) -> Artifact | None:
        """The result of that step, if it is here whole; see `step`."""
        return self._finished(_step_key(kind, tuple(parents), settings))

    def _finished(self, key: str) -> Artifact | None:
        """The recorded result, if its blobs are sound.

        Files up to `REHASH_LIMIT_BYTES` are hashed again (a fraction of a second each); larger ones must
        have the right size, and `verify` reads them whole.
        """
        artifact = self._index.step_result(key)
        if artifact is None or not all(self._is_sound(entry) for entry in artifact.files.values()):
            return None
        return artifact

    def _is_sound(self, entry: FileEntry) -> bool:
        if not self.store.has(entry):
            return False
        return entry.size_bytes > REHASH_LIMIT_BYTES or hash_file(self.store.path(entry.sha256)) == entry

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
        return hash_file(path) == entry if path.is_file() else self._is_sound(entry)

    def _take_in(self, artifact: Artifact, out: Path) -> None:
        for path, entry in artifact.files.items():
            if (out / path).exists():
                self.store.adopt(out / path, entry)


def _step_key(kind: str, parents: tuple[str, ...], settings: Settings) -> str:
    return sha256_of({"kind": kind, "parents": parents, "settings": settings})


def _seal(workdir: Path, kind: str, parents: tuple[str, ...], settings: Settings, build: Build) -> Artifact:
    """Run `build`, hash what it left, and note that it is done."""
    with disk_errors(workdir):
        workdir.mkdir(exist_ok=True)
    facts = build(workdir)
    out = workdir / "out"
    files = {}
    for path in _files_below(out):
        with disk_errors(out / path):
            files[path] = hash_file(out / path)
            fsync(out / path)
    artifact = Artifact.create(kind, files, parents, {**(facts or {}), "settings": settings})
    write_atomically(workdir / "sealed.json", artifact.to_json())
    return artifact


def _files_below(folder: Path) -> list[str]:
    """Relative posix paths of all files, sorted."""
    if not folder.is_dir():
        raise RegistryError(f"{folder} is not a folder, so that there is nothing to add to the registry.")
    found = []
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise RegistryError(
                f"{path} is a link or a special file. The registry keeps plain files: replace it by a copy."
            )
        if path.is_file():
            found.append(checked_path(path.relative_to(folder).as_posix()))
    if not found:
        raise RegistryError(f"{folder} holds no file, so that there is nothing to add to the registry.")
    return sorted(found)


def _remove(workdir: Path) -> None:
    with disk_errors(workdir):
        if workdir.exists():
            shutil.rmtree(workdir)
