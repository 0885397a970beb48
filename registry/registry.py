"""The registry: results that are never made twice, and versions that never change.

<root>/
    registry.toml    where index and blobs are, if not here (settings.py)
    index.sqlite     artifacts, lineage, finished steps (index.py), versions and aliases (ledger.py)
    records/         the same as files, in case the index is lost (records.py)
    blobs/           every file once, by its hash (store.py); copies of them if they are elsewhere (remote.py)
    steps/           work under way (step.py)
    uses/            what living processes need (uses.py)
    pulls/           downloads under way (hub_repository.py)
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from registry.alias import AliasMove, actor, checked_alias
from registry.artifact import Artifact
from registry.errors import (
    AmbiguousDigestError,
    IntegrityError,
    InvalidDescriptionError,
    InvalidNameError,
    NotFoundError,
)
from registry.files import files_below
from registry.progress import SILENT, Progress
from registry.read_only import is_writable
from registry.remote import remote_blobs
from registry.store import Store
from registry.uses import Uses
from registry.verification import Verification
from registry.version import Version, VersionReference, checked_name

if TYPE_CHECKING:
    from registry.collected import Collected
    from registry.doctor import Finding
    from registry.index import Index
    from registry.ledger import Ledger
    from registry.step import Build, Settings, Steps


@dataclass(frozen=True)
class Lineage:
    """An artifact and all that it was made from, nearest first; `missing` are digests not known here."""

    artifacts: tuple[Artifact, ...]
    missing: tuple[str, ...]


class Registry:
    """A folder with everything that was made. Any number of processes may use it at once.

    Args:
        read_only: leave the index as it is, even its notes of when a result was last used.
    Raises:
        RegistryError: the folder cannot be made or read, or its registry.toml not be read.
    """

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        self.root = Path(root)
        self._read_only = read_only
        self.store = Store(self.root, remote_blobs(self.root))

    @cached_property
    def _index(self) -> "Index":
        from registry.opening import open_index  # SQLAlchemy takes a quarter of a second to import

        return open_index(self.root, read_only=self._read_only)

    @cached_property
    def _ledger(self) -> "Ledger":
        from registry.ledger import Ledger

        return Ledger(self._index)

    @cached_property
    def _uses(self) -> Uses:
        return Uses(self.root / "uses")

    @cached_property
    def _steps(self) -> "Steps":
        from registry.step import Steps

        return Steps(self.root / "steps", self.store, self._index, self._uses)

    # Artifacts

    def add_artifact(
        self,
        kind: str,
        folder: Path,
        parents: Iterable[str] = (),
        metadata: "Settings | None" = None,
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
        with self._index.database.keeping():
            files = {path: self.store.add(folder / path, move=move) for path in files_below(folder)}
            artifact = Artifact.create(kind, files, parents, metadata)
            self._uses.add(artifact.digest)
            self._index.add_artifact(artifact)
        return artifact

    def record(self, artifact: Artifact) -> None:
        """Enter an artifact whose blobs are all in the store. Raises NotFoundError naming one that is not."""
        with self._index.database.keeping():
            for path, entry in artifact.files.items():
                if not self.store.has(entry):
                    raise NotFoundError(f"{path} of {artifact.kind} {artifact.digest[:12]} is not in the store.")
            self._uses.add(artifact.digest)
            self._index.add_artifact(artifact)

    def remember(self, artifact: Artifact) -> None:
        """Enter an artifact as what another was made from, whether its blobs are here or not."""
        self._index.add_artifact(artifact)

    def adding(self) -> AbstractContextManager[None]:
        """Nothing that is added inside is collected before the end."""
        return self._index.database.keeping()

    def get(self, digest: str) -> Artifact:
        """The artifact of that full digest. Raises NotFoundError."""
        artifact = self._index.artifact(digest)
        if artifact is None and digest in self._index.lost():
            raise NotFoundError(
                f"The description of artifact {digest[:12]} is lost; `bitsmith registry doctor` names the versions "
                "that need it. Pull or import such a version again, or run the command that made it again."
            )
        if artifact is None:
            raise NotFoundError.among("artifact", digest, self._index.digests(), "Digests have 64 hex digits.")
        return artifact

    def was_made_here(self, digest: str) -> bool:
        """By a step in this registry, rather than pulled or imported."""
        return self._index.records.was_made(digest)

    def described(self, digests: Iterable[str]) -> dict[str, Artifact]:
        """Those of the artifacts that are known here, by digest: one question for all."""
        return self._index.described(set(digests))

    def of_kind(self, kind: str) -> list[Artifact]:
        """All artifacts of that kind, by digest."""
        return self._index.of_kind(kind)

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

    def children(self, digest: str) -> list[Artifact]:
        """What was made from the artifact itself, such as its signatures."""
        return [self.get(child) for child in self._index.children(digest)]

    # Versions

    def checked_name(self, name: str) -> str:
        """`name` if versions may be published under it here, else InvalidNameError."""
        checked_name(name)
        like = {version.name for version in self.versions() if version.name.casefold() == name.casefold()}
        if like and name not in like:
            raise InvalidNameError(
                f"{name!r} differs from {min(like)!r}, which is here already, in the case of letters alone: some file "
                "systems take both for one. Choose another name."
            )
        return name

    def publish(self, name: str, artifact: Artifact, report: Artifact | None = None, note: str = "") -> Version:
        """Give `artifact` the next version number under `name`.

        The same artifact under the same name again is the version that it already is, with its first report
        and note.

        Raises:
            InvalidNameError: `name` is malformed, or another's but for the case of its letters.
            NotFoundError: `artifact` or `report` is not in this registry.
        """
        self.checked_name(name)
        with self._index.database.keeping():
            self.get(artifact.digest)
            if report is not None:
                self.get(report.digest)
            return self._ledger.add_version(name, artifact.digest, report.digest if report else None, note)

    def version(self, reference: str) -> Version:
        """The version that "name:3" or "name@alias" names, or the latest of "name".

        Raises:
            NotFoundError: names the versions or aliases that are there, or the nearest names.
            InvalidNameError: `reference` is malformed.
        """
        wanted = VersionReference.parse(reference)
        aliases = self.aliases(wanted.name) if wanted.alias else {}
        if wanted.alias is None or wanted.alias in aliases:
            number = aliases[wanted.alias] if wanted.alias else wanted.number
            if (version := self._ledger.version(wanted.name, number)) is not None:
                return version
        everything = self.versions()
        advice = "`bitsmith registry list` shows all."
        if wanted.alias and any(version.name == wanted.name for version in everything):
            advice = f"`bitsmith registry alias {wanted.name} {wanted.alias}` makes it."
            raise NotFoundError.among("alias", reference, (f"{wanted.name}@{alias}" for alias in aliases), advice)
        if mine := [str(version) for version in everything if version.name == wanted.name]:
            raise NotFoundError.among("version", reference, mine, advice)
        raise NotFoundError.among("model", wanted.name, (version.name for version in everything), advice)

    def versions(self) -> list[Version]:
        """All versions, by name and number."""
        return self._ledger.versions()

    # Aliases

    def aliases(self, name: str) -> dict[str, int]:
        """alias -> number of the version of `name`; without `latest`, which needs no entry."""
        return self._ledger.aliases(name)

    def all_aliases(self) -> dict[str, dict[str, int]]:
        """Of every name that has some, `aliases`."""
        return self._ledger.all_aliases()

    def alias(self, reference: str, alias: str, *, reason: str = "", action: str = AliasMove.SET) -> AliasMove:
        """Let `alias` name the version that `reference` names now. Every move is logged, for good.

        Args:
            action: AliasMove.SET, or PROMOTE where a gate was passed.
        Raises:
            InvalidNameError: `alias` or `reference` is malformed, or `alias` is "latest".
            NotFoundError: there is no such version.
        """
        checked_alias(alias)
        version = self.version(reference)
        return self._ledger.move_alias(
            version.name, alias, version.number, action=action, moved_by=actor(), reason=reason
        )

    def remove_alias(self, name: str, alias: str, *, reason: str = "") -> AliasMove:
        """Let `alias` name nothing any more. Raises NotFoundError where it did not."""
        self.version(f"{name}@{checked_alias(alias)}")
        return self._ledger.move_alias(name, alias, None, action=AliasMove.REMOVE, moved_by=actor(), reason=reason)

    def rollback(self, name: str, alias: str, *, reason: str = "") -> AliasMove:
        """Let `alias` name what it named before its last move; again, what it named before that.

        Raises:
            NotFoundError: `alias` names nothing, or never named another version.
        """
        current = self.version(f"{name}@{checked_alias(alias)}")
        move = self._ledger.move_alias_back(name, alias, moved_by=actor(), reason=reason)
        if move is None:
            raise NotFoundError(
                f"{name}@{alias} has named no version before {current}, so that there is nothing to go back to. "
                f"`bitsmith registry alias {name}:NUMBER {alias}` names another."
            )
        return move

    def alias_moves(self, name: str, alias: str | None = None) -> list[AliasMove]:
        """The log of one model's aliases, the oldest move first."""
        return self._ledger.moves(checked_name(name), alias)

    # Soundness

    def verify(self, reference: str, *, progress: Progress = SILENT) -> Verification:
        """Re-hash every file of a version and of its report, and read the records of what they were made from.

        What is wrong is in the result; nothing is raised for it.
        """
        version = self.version(reference)
        artifact = self.get(version.digest)
        report = self.get(version.report_digest) if version.report_digest else None
        entries = dict(artifact.files)
        entries |= {f"report/{path}": entry for path, entry in report.files.items()} if report else {}
        described = {each.digest for one in (artifact, report) if one for each in self.lineage(one.digest).artifacts}
        missing, damaged = self._wrong_records(described)
        for path, entry in progress.track(entries.items(), f"verify {version}", len(entries)):
            try:
                self.store.verify(entry, path)
            except NotFoundError:
                missing.append(path)
            except IntegrityError as error:
                damaged[path] = error
        num_report_files = len(report.files) if report else 0
        num_files, size_bytes = len(artifact.files), artifact.size_bytes
        return Verification(version, tuple(missing), damaged, num_files, size_bytes, num_report_files, len(described))

    def _wrong_records(self, digests: set[str]) -> tuple[list[str], dict[str, IntegrityError]]:
        """Records of these artifacts that are missing, unless another host has them, or that cannot be read."""
        missing: list[str] = []
        damaged: dict[str, IntegrityError] = {}
        for digest in sorted(digests):
            path = f"records/{digest[:12]}"
            try:
                if self._index.records.artifact(digest) is None and self.store.remote is None:
                    missing.append(path)
            except InvalidDescriptionError:
                damaged[path] = IntegrityError(path, f"the description of {digest}", "one that cannot be read")
        return missing, damaged

    @staticmethod
    def examine(root: Path, *, repair: bool = False, progress: Progress = SILENT) -> "list[Finding]":
        """All damages of the registry in `root`, which need not open; see doctor.py."""
        from registry.doctor import examine

        return examine(Path(root), repair=repair, progress=progress)

    def collect_garbage(self, *, grace_seconds: float, dry_run: bool = False) -> "Collected":
        """Remove what no version, no living process and nobody within the grace needs; see collection.py."""
        from registry.collection import collect

        return collect(self.root, self.store, self._index, self._ledger, grace_seconds=grace_seconds, dry_run=dry_run)

    # Steps

    def step(
        self,
        kind: str,
        parents: Iterable[str],
        settings: "Settings",
        build: "Build",
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
        return self._steps.run(kind, parents, settings, build, resume=resume, progress=progress)

    def has_step(self, kind: str, parents: Iterable[str], settings: "Settings") -> Artifact | None:
        """The result of that step, if it is here, for whoever asks; of files over 64 MiB only the size is looked at."""
        return self._steps.find(kind, parents, settings)

    def finished_step(
        self, kind: str, parents: Iterable[str], settings: "Settings", progress: Progress = SILENT
    ) -> Artifact | None:
        """The same for whoever will use it: every byte is hashed, and it is noted as used, where that can be."""
        is_noted = not self._read_only and is_writable(self.root)
        return self._steps.reuse(kind, parents, settings, is_noted=is_noted, progress=progress)

    def step_work_bytes(self, kind: str, parents: Iterable[str], settings: "Settings") -> int:
        """What the work folder of that step holds: 0 unless somebody is at it, or was killed there."""
        return self._steps.work_bytes(kind, parents, settings)
