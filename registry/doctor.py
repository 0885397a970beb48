"""Examine a whole registry: find every damage, name it, and repair what can be repaired.

A missing, malformed or half made index is made anew from the records, and an older one brought up to them; tables that
follow from others are compared with them (derived.py). Records that
are missing or damaged are written again from the index. Damaged blobs are set aside; the step, or the pull, that made
them makes them again. With a remote store the sound one of two copies, there and in the cache, mends the other; and
records that are missing here are no damage, but what other hosts made: they are written here too.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from registry.artifact import Artifact
from registry.blobs_examined import damaged_blobs
from registry.database import sqlite_path
from registry.derived import disagreements
from registry.errors import IndexLostError, InvalidDescriptionError, NotFoundError, RegistryError
from registry.finding import REPAIR, Finding
from registry.index import Index
from registry.ledger import Ledger
from registry.opening import database_url, is_interrupted, open_index, rebuilt_index
from registry.progress import SILENT, Progress
from registry.read_only import is_writable
from registry.records import Records
from registry.remote import remote_blobs
from registry.salvage import is_lost, lost_descriptions, lost_facts
from registry.store import Store
from registry.version import Version


def examine(root: Path, *, repair: bool, progress: Progress = SILENT) -> list[Finding]:
    """All damages of the registry in `root`; every blob is read.

    Raises:
        NotFoundError: there is no such folder.
        RegistryError: the disk or the database refuses for another reason than damage.
    """
    if not root.exists():
        raise NotFoundError(
            f"There is no registry in {root}: nothing was made there yet, or BITSMITH_HOME names the wrong place."
        )
    if repair and not is_writable(root):
        raise RegistryError(
            f"{root} is read-only for you, so that nothing there can be mended. Run `bitsmith registry doctor` without "
            "--repair to look only, or repair where the folder may be written."
        )
    return list(_Examination(root, Store(root, remote_blobs(root)), repair, progress).findings())


@dataclass
class _Examination:
    root: Path
    store: Store
    repair: bool
    progress: Progress
    lost: set[str] = field(default_factory=set)  # digests whose record was damaged, and the only one

    def findings(self) -> Iterator[Finding]:
        if (useless := self._malformed()) is None:
            try:
                index = open_index(self.root)
            except IndexLostError as error:
                problem = "was not made to its end" if is_interrupted(self.root) else "is missing or empty"
                useless = Finding("the index", problem, self.repair, str(error))
        if useless is not None:
            unread = self._unreadable(Records(self.root))
            if self.repair and (is_interrupted(self.root) or Records(self.root).has_versions()):
                rebuilt_index(self.root)
            yield from (useless, *unread)
            if not self.repair:
                return
            index = open_index(self.root)
        ledger = Ledger(index)
        artifacts, damaged = index.readable()
        yield from self._rows(index, ledger, damaged)
        yield from self._records_of_artifacts(index.records, artifacts)
        if self.repair:
            index.note_made()
        yield from self._records_of_names(index.records, ledger)
        unread = self._unreadable(index.records, index, ledger)
        yield from unread
        if self.repair or not unread:
            yield from self._behind(index, ledger)
        versions = [fact for fact in ledger.facts() if isinstance(fact, Version)]
        yield from self._lost(index, versions)
        artifacts, _ = index.readable()
        yield from disagreements(index, ledger, artifacts, repair=self.repair)
        yield from damaged_blobs(self.store, artifacts, versions, repair=self.repair, progress=self.progress)

    def _malformed(self) -> Finding | None:
        """A SQLite file that SQLite itself does not understand."""
        path = sqlite_path(database_url(self.root))
        if path is None or not path.exists():
            return None
        try:
            with closing(sqlite3.connect(path)) as connection:
                (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        except sqlite3.OperationalError:
            return None  # locked or unreadable: opening it says so
        except sqlite3.DatabaseError as error:
            verdict = str(error)
        if verdict == "ok":
            return None
        if self.repair:
            number = next(n for n in range(1, 1000) if not path.with_name(f"{path.name}.damaged-{n}").exists())
            for each in sorted(path.parent.glob(f"{path.name}*")):
                if ".damaged-" not in each.name and not each.name.endswith(".lock"):
                    os.replace(each, each.with_name(f"{each.name}.damaged-{number}"))
        return Finding(str(path), f"is malformed ({verdict})", self.repair, REPAIR)

    def _rows(self, index: Index, ledger: Ledger, damaged: dict[str, InvalidDescriptionError]) -> Iterator[Finding]:
        """Descriptions in the database that cannot be read."""
        needed = {d for fact in ledger.facts() if isinstance(fact, Version) for d in (fact.digest, fact.report_digest)}
        for digest, error in damaged.items():
            if self.repair:
                try:
                    artifact = index.records.artifact(digest)
                except InvalidDescriptionError:
                    artifact = None
                index.write_again(digest, artifact, is_needed=digest in needed)
            what = f"the index's row of artifact {digest[:12]}"
            yield Finding(what, f"is damaged ({error.__cause__})", self.repair, REPAIR)

    def _unreadable(self, records: Records, index: Index | None = None, ledger: Ledger | None = None) -> list[Finding]:
        """Records that cannot be read, of what the database does not know; see salvage.py."""
        known = index.digests() if index else []
        facts = {(type(fact), fact.name, fact.number) for fact in ledger.facts()} if ledger else set()
        described = dict(lost_descriptions(records, set(known), repair=self.repair))
        self.lost |= described.keys()
        return [*described.values(), *lost_facts(records, facts, repair=self.repair)]

    def _lost(self, index: Index, versions: list[Version]) -> Iterator[Finding]:
        """Versions without a description of what they are, and those that lost one of what they were made from."""
        lost = index.lost()
        for version in versions:
            again = "Pull or import it again, or run the command that made it again"
            if is_lost(version):
                again = "Publish it again, under the next number"
            for noun, digest in (("it", version.digest), ("its report", version.report_digest)):
                if digest in lost:
                    problem = f"is damaged: the description of {noun} ({digest[:12]}) is lost"
                    yield Finding(str(version), problem, False, f"{again}, or restore the record from a backup.")
        for digest in sorted(self.lost - lost):
            if made := [str(version) for version in versions if digest in index.ancestors(version.digest)]:
                problem = f"lost the description of {digest[:12]}, which it was made from"
                yield Finding(", ".join(made), problem, False, "Its own files are not concerned.")

    def _records_of_artifacts(self, records: Records, artifacts: list[Artifact]) -> Iterator[Finding]:
        for artifact in artifacts:
            what = f"the record of artifact {artifact.digest[:12]}"
            try:
                problem = None if records.artifact(artifact.digest) else "is missing"
            except InvalidDescriptionError as error:
                problem = f"is damaged ({error.__cause__ or error})"
            if problem is None:
                continue
            is_elsewhere = self._is_elsewhere(problem)
            if self.repair or is_elsewhere:
                records.remove_artifact(artifact.digest)
                records.add_artifact(artifact)
            if not is_elsewhere:
                yield Finding(what, problem, self.repair, REPAIR)

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
                    "Restore the index that belongs to these files; or, if the record is right, move the index away, "
                    "and `bitsmith registry doctor --repair` makes it anew.",
                )
                continue
            is_elsewhere = self._is_elsewhere(problem)
            if self.repair or is_elsewhere:
                records.replace(fact)
            if not is_elsewhere:
                yield Finding(what, problem, self.repair, REPAIR)

    def _is_elsewhere(self, problem: str) -> bool:
        """Is it a record that the host has which made the thing?"""
        return problem == "is missing" and self.store.remote is not None

    def _behind(self, index: Index, ledger: Ledger) -> Iterator[Finding]:
        """What only the records have: an index from a backup, or a kill between a record and the commit."""
        facts = {(type(fact), fact.name, fact.number) for fact in ledger.facts()}
        ledger.take_in_records()
        added = [fact for fact in ledger.facts() if (type(fact), fact.name, fact.number) not in facts]
        artifacts = index.take_in_records()
        for fact in added:
            kind = "version" if isinstance(fact, Version) else "move"
            yield Finding("the index", f"lacked {kind} {fact.number} of {fact.name}", is_writable(self.root), REPAIR)
        if artifacts:
            yield Finding("the index", f"lacked {len(artifacts)} artifacts", is_writable(self.root), REPAIR)
