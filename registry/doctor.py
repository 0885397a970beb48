"""Examine a whole registry: find every damage, name it, and repair what can be repaired.

A missing, malformed or half made index is made anew from the records, and an older one brought up to them. Records that
are missing or damaged are written again from the index. Damaged blobs are set aside; the step, or the pull, that made
them makes them again. With a remote store the sound one of two copies, there and in the cache, mends the other; and
records that are missing here are no damage, but what other hosts made: they are written here too.
"""

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from registry.artifact import Artifact
from registry.database import sqlite_path
from registry.errors import IndexLostError, IntegrityError, InvalidDescriptionError, NotFoundError
from registry.index import Index
from registry.ledger import Ledger
from registry.opening import database_url, is_interrupted, open_index, rebuilt_index
from registry.progress import SILENT, Progress
from registry.records import Records
from registry.remote import remote_blobs
from registry.store import Store
from registry.version import Version


@dataclass(frozen=True)
class Finding:
    """One damage.

    Attributes:
        what: the file, version or database.
        problem: in words.
        is_repaired: now; False where it only was found, or cannot be.
        advice: what to do where it is not.
    """

    what: str
    problem: str
    is_repaired: bool
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.problem}. " + ("Repaired." if self.is_repaired else self.advice)


_REPAIR = "`bitsmith registry doctor --repair` mends it."


def examine(root: Path, *, repair: bool, progress: Progress = SILENT) -> list[Finding]:
    """All damages of the registry in `root`; every blob is read.

    Raises:
        RegistryError: the disk or the database refuses for another reason than damage.
    """
    return list(_Examination(root, Store(root, remote_blobs(root)), repair, progress).findings())


@dataclass
class _Examination:
    root: Path
    store: Store
    repair: bool
    progress: Progress
    users: dict[str, list[str]] = field(default_factory=dict)  # digest -> the versions that need the artifact

    def findings(self) -> Iterator[Finding]:
        yield from self._malformed()
        try:
            index = open_index(self.root)
        except IndexLostError as error:
            problem = "was not made to its end" if is_interrupted(self.root) else "is missing or empty"
            if not self.repair:
                yield Finding("the index", problem, False, str(error))
                return
            index = rebuilt_index(self.root)
            yield Finding("the index", problem, True)
        ledger = Ledger(index)
        yield from self._records_of_artifacts(index)
        yield from self._records_of_names(index.records, ledger)
        yield from self._behind(index, ledger)
        for version in ledger.versions():
            for digest in filter(None, (version.digest, version.report_digest)):
                self.users.setdefault(digest, []).append(str(version))
        yield from self._blobs([artifact for artifact, _ in index.artifacts()])

    def _malformed(self) -> Iterator[Finding]:
        """A SQLite file that SQLite itself does not understand."""
        path = sqlite_path(database_url(self.root))
        if path is None or not path.exists():
            return
        try:
            connection = sqlite3.connect(path)
            try:
                (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            finally:
                connection.close()
        except sqlite3.OperationalError:
            return  # locked or unreadable: opening it says so
        except sqlite3.DatabaseError as error:
            verdict = str(error)
        if verdict == "ok":
            return
        if self.repair:
            number = next(n for n in range(1, 1000) if not path.with_name(f"{path.name}.damaged-{n}").exists())
            for each in sorted(path.parent.glob(f"{path.name}*")):
                if ".damaged-" not in each.name and not each.name.endswith(".lock"):
                    os.replace(each, each.with_name(f"{each.name}.damaged-{number}"))
            if Records(self.root).has_versions():
                rebuilt_index(self.root)
        yield Finding(str(path), f"is malformed ({verdict})", self.repair, _REPAIR)

    def _records_of_artifacts(self, index: Index) -> Iterator[Finding]:
        known = {artifact.digest: artifact for artifact, _ in index.artifacts()}
        for digest in {*known, *index.records.digests()}:
            what = f"the record of artifact {digest[:12]}"
            try:
                found = index.records.artifact(digest)
                problem = None if found else "is missing"
            except (InvalidDescriptionError, IntegrityError) as error:
                problem = f"is damaged ({error})"
            if problem is None:
                continue
            if digest not in known:  # nothing to write it from
                yield Finding(what, problem, False, "Restore the file from a backup, or remove it.")
                continue
            is_elsewhere = self._is_elsewhere(problem)
            if self.repair or is_elsewhere:
                index.records.remove_artifact(digest)
                index.records.add_artifact(known[digest])
            if not is_elsewhere:
                yield Finding(what, problem, self.repair, _REPAIR)

    def _records_of_names(self, records: Records, ledger: Ledger) -> Iterator[Finding]:
        for fact in ledger.facts():
            kind = "version" if isinstance(fact, Version) else "move"
            what = f"the record of {kind} {fact.number} of {fact.name}"
            try:
                kind_of_fact: type = type(fact)
                found = records.read(kind_of_fact, fact.name, fact.number)
                problem = "is missing" if found is None else None if found == fact else "says something else"
            except InvalidDescriptionError as error:
                problem = f"is damaged ({error})"
            if problem is None:
                continue
            if problem == "says something else":
                yield Finding(
                    what,
                    f"says {found!r}, and the index {fact!r}",
                    False,
                    "Two registries were mixed: restore the index that belongs to these files.",
                )
                continue
            is_elsewhere = self._is_elsewhere(problem)
            if self.repair or is_elsewhere:
                records.replace(fact)
            if not is_elsewhere:
                yield Finding(what, problem, self.repair, _REPAIR)

    def _is_elsewhere(self, problem: str) -> bool:
        """Is it a record that the host has which made the thing?"""
        return problem == "is missing" and self.store.remote is not None

    def _behind(self, index: Index, ledger: Ledger) -> Iterator[Finding]:
        """What only the records have: an index from a backup, or a kill between a record and the commit."""
        facts = {(type(fact), fact.name, fact.number) for fact in ledger.facts()}
        try:
            ledger.take_in_records()
            added = [fact for fact in ledger.facts() if (type(fact), fact.name, fact.number) not in facts]
            artifacts = index.take_in_records()
        except (InvalidDescriptionError, IntegrityError) as error:
            yield Finding("the records", str(error), False, "Restore the file from a backup.")
            return
        for fact in added:
            kind = "version" if isinstance(fact, Version) else "move"
            yield Finding("the index", f"lacked {kind} {fact.number} of {fact.name}", True)
        if artifacts:
            yield Finding("the index", f"lacked {len(artifacts)} artifacts", True)

    def _blobs(self, artifacts: list[Artifact]) -> Iterator[Finding]:
        places: dict[str, list[tuple[Artifact, str]]] = {}
        for artifact in artifacts:
            for path, entry in artifact.files.items():
                places.setdefault(entry.sha256, []).append((artifact, path))
        for sha256, users in self.progress.track(sorted(places.items()), "Files", len(places)):
            artifact, path = users[0]
            try:
                self.store.verify(artifact.files[path], path)
                continue
            except NotFoundError:
                problem, was_damaged = "is missing", False
            except IntegrityError as error:
                problem, was_damaged = f"is damaged: expected {error.expected}, found {error.got}", True
            if self.repair and self.store.mend(artifact.files[path]):
                yield Finding(f"{path} (blob {sha256[:12]})", problem, True)
                continue
            if self.repair and was_damaged:
                aside = self.store.set_aside(sha256)
                problem += f" (now {aside})"
            versions = sorted({name for user, _ in users for name in self.users.get(user.digest, ())})
            if versions:
                advice = (
                    f"It belongs to {', '.join(versions)}. Run the command that made it again, or pull it again: the "
                    "same bytes heal every version that has them."
                )
                if self.store.remote is not None and not self.repair:
                    advice = f"If the other copy, in the store or in the cache, is sound, {_REPAIR} Else: {advice}"
                yield Finding(f"{path} (blob {sha256[:12]})", problem, False, advice)
            elif was_damaged:
                what = f"{path} of {artifact.kind} {artifact.digest[:12]} (blob {sha256[:12]})"
                advice = "No version needs it: it is made again when a run needs it."
                yield Finding(what, problem, self.repair, f"{advice} {_REPAIR}")
