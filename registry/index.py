"""Artifacts, what they were made from, and the steps that made them: questions to a `Database`, and changes of it.

Each change is one transaction. The record of an artifact (records.py) is written before, so that the database is never
ahead of the records.

A version whose artifact's description is lost keeps its number: the row of the artifact is there with an empty
description, and questions pass over it. Whoever adds the artifact again fills it.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, Row, delete, func, literal, select, update

from registry.artifact import Artifact, sha256_of
from registry.database import Database
from registry.errors import IntegrityError, InvalidDescriptionError, UnsafePathError
from registry.records import Records
from registry.schema import artifact_parents, artifacts, step_results

LOST = ""  # in place of a description
MOST_PARAMETERS = 500  # of one statement; SQLite's own limit was 999 once


class Index:
    """What `database` knows of artifacts. Every method raises RegistryError as `Database` and `Records` do."""

    def __init__(self, database: Database, records: Records) -> None:
        self.database = database
        self.records = records

    # Artifacts

    def add_artifact(self, artifact: Artifact) -> None:
        """Record an artifact and its parents, or that one that is known already was used now."""
        self.records.add_artifact(artifact)
        with self.database.writing() as connection:
            self.insert_artifact(connection, artifact)

    def artifact(self, digest: str) -> Artifact | None:
        """The artifact of that exact digest."""
        with self.database.reading() as connection:
            found = connection.scalar(select(artifacts.c.description).where(artifacts.c.digest == digest))
        return _read(digest, found) if found else None

    def described(self, digests: Collection[str]) -> dict[str, Artifact]:
        """Those of the artifacts that are known, by digest."""
        wanted, rows = sorted(digests), list[Row]()
        query = select(artifacts.c.digest, artifacts.c.description).where(artifacts.c.description != LOST)
        with self.database.reading() as connection:
            for start in range(0, len(wanted), MOST_PARAMETERS):
                some = artifacts.c.digest.in_(wanted[start : start + MOST_PARAMETERS])
                rows += connection.execute(query.where(some)).all()
        return {digest: _read(digest, description) for digest, description in rows}

    def of_kind(self, kind: str) -> list[Artifact]:
        """All artifacts of that kind, by digest."""
        query = select(artifacts.c.digest, artifacts.c.description).order_by(artifacts.c.digest)
        mine = (artifacts.c.kind == kind) & (artifacts.c.description != LOST)
        with self.database.reading() as connection:
            rows = connection.execute(query.where(mine)).all()
        return [_read(digest, description) for digest, description in rows]

    def artifacts(self) -> list[tuple[Artifact, str]]:
        """All artifacts, each with the time of its last use."""
        query = select(artifacts.c.digest, artifacts.c.description, artifacts.c.used_at).order_by(artifacts.c.digest)
        with self.database.reading() as connection:
            rows = connection.execute(query.where(artifacts.c.description != LOST)).all()
        return [(_read(digest, description), used_at) for digest, description, used_at in rows]

    def readable(self) -> tuple[list[Artifact], dict[str, InvalidDescriptionError]]:
        """All artifacts whose row can be read, and why the others cannot, by their digests."""
        query = select(artifacts.c.digest, artifacts.c.description).order_by(artifacts.c.digest)
        with self.database.reading() as connection:
            rows = connection.execute(query.where(artifacts.c.description != LOST)).all()
        found, damaged = [], {}
        for digest, description in rows:
            try:
                found.append(_read(digest, description))
            except InvalidDescriptionError as error:
                damaged[digest] = error
        return found, damaged

    def lost(self) -> set[str]:
        """Digests that a version has, and whose description is lost."""
        with self.database.reading() as connection:
            return set(connection.scalars(select(artifacts.c.digest).where(artifacts.c.description == LOST)))

    def digests(self, prefix: str = "") -> list[str]:
        """All digests that start with `prefix`, sorted."""
        mine = artifacts.c.digest.startswith(prefix, autoescape=True) & (artifacts.c.description != LOST)
        with self.database.reading() as connection:
            return list(connection.scalars(select(artifacts.c.digest).where(mine).order_by(artifacts.c.digest)))

    def ancestors(self, digest: str) -> list[str]:
        """`digest` and all that it was made from, nearest first, known here or not."""
        line = select(literal(digest).label("digest"), literal(0).label("depth")).cte("line", recursive=True)
        step = select(artifact_parents.c.parent, line.c.depth + 1)
        line = line.union(step.join(line, artifact_parents.c.digest == line.c.digest))
        query = select(line.c.digest).group_by(line.c.digest).order_by(func.min(line.c.depth), line.c.digest)
        with self.database.reading() as connection:
            return list(connection.scalars(query))

    def children(self, digest: str) -> list[str]:
        """What was made from `digest` itself, sorted."""
        query = select(artifact_parents.c.digest).where(artifact_parents.c.parent == digest).distinct()
        with self.database.reading() as connection:
            return sorted(connection.scalars(query))

    def forget_artifacts(self, digests: Collection[str]) -> None:
        """Drop artifacts, and the records that steps made them. No version may need one."""
        wanted = sorted(digests)
        for digest in wanted:
            self.records.remove_artifact(digest)
        with self.database.writing() as connection:
            for start in range(0, len(wanted), MOST_PARAMETERS):
                _forget(connection, wanted[start : start + MOST_PARAMETERS])

    # Steps

    def record_step(self, key: str, artifact: Artifact) -> None:
        """Record `artifact` and that it is the result of step `key`, in one transaction."""
        self.records.add_artifact(artifact)
        self.records.note_made(artifact.digest)
        with self.database.writing() as connection:
            self.insert_artifact(connection, artifact)
            self._insert_step(connection, key, artifact.digest)

    def step_result(self, key: str) -> Artifact | None:
        """The recorded result of step `key`."""
        with self.database.reading() as connection:
            digest = connection.scalar(select(step_results.c.digest).where(step_results.c.key == key))
        return None if digest is None else self.artifact(digest)

    def note_made(self) -> None:
        """Write the records of what steps made that are missing."""
        with self.database.reading() as connection:
            found = list(connection.scalars(select(step_results.c.digest)))
        for digest in found:
            self.records.note_made(digest)

    def forget_step(self, key: str) -> None:
        """Drop the record that step `key` is done; its artifact stays."""
        with self.database.writing() as connection:
            connection.execute(delete(step_results).where(step_results.c.key == key))

    # Records

    def take_in_records(self) -> list[Artifact]:
        """Add every artifact that only the records have, as used now; the result of its step if a step here made it.

        Returns:
            those that were added.
        """
        added = [artifact for digest in self.unknown() if (artifact := self.records.artifact(digest))]
        for artifact in added:
            key = step_key_of(artifact)
            with self.database.writing() as connection:
                self.insert_artifact(connection, artifact)
                if key is not None and self.records.was_made(artifact.digest):
                    self._insert_step(connection, key, artifact.digest)
        return added

    def note_results(self, made: Iterable[Artifact], keys: Collection[str]) -> None:
        """Record again what steps here made, of the steps with these keys."""
        for artifact in made:
            if (key := step_key_of(artifact)) in keys and key is not None and self.records.was_made(artifact.digest):
                with self.database.writing() as connection:
                    self._insert_step(connection, key, artifact.digest)

    def unknown(self) -> list[str]:
        """Digests that only the records have."""
        known = set(self.digests())
        return [digest for digest in self.records.digests() if digest not in known]

    def write_again(self, digest: str, artifact: Artifact | None, *, is_needed: bool) -> None:
        """Mend a row that cannot be read: write `artifact`, or that it is lost, or remove the row if none needs it."""
        with self.database.writing() as connection:
            if artifact is not None:
                self.insert_artifact(connection, artifact)
            elif is_needed:
                connection.execute(update(artifacts).where(artifacts.c.digest == digest).values(description=LOST))
            else:
                _forget(connection, [digest])

    # Within a transaction

    def is_known(self, connection: Connection, digest: str) -> bool:
        """Is the artifact in the database?"""
        return bool(connection.scalar(select(artifacts.c.description).where(artifacts.c.digest == digest)))

    def mark_lost(self, connection: Connection, digest: str) -> None:
        """Note that a version has this artifact, and that nothing describes it any more."""
        now = self._now(connection)
        row = self.database.insert(artifacts).values(
            digest=digest, kind="", description=LOST, created_at=now, used_at=now
        )
        connection.execute(row.on_conflict_do_nothing())

    def insert_artifact(self, connection: Connection, artifact: Artifact) -> None:
        """Add the artifact, whose record is there, or note that it is used now."""
        now = self._now(connection)
        values = {"kind": artifact.kind, "description": artifact.to_json(), "used_at": now}
        row = self.database.insert(artifacts).values(digest=artifact.digest, created_at=now, **values)
        connection.execute(row.on_conflict_do_update(index_elements=["digest"], set_=values))
        if artifact.parents:
            parents = [
                {"digest": artifact.digest, "position": position, "parent": parent}
                for position, parent in enumerate(artifact.parents)
            ]
            connection.execute(self.database.insert(artifact_parents).on_conflict_do_nothing(), parents)

    def _insert_step(self, connection: Connection, key: str, digest: str) -> None:
        row = self.database.insert(step_results).values(key=key, digest=digest, created_at=self._now(connection))
        connection.execute(row.on_conflict_do_update(index_elements=["key"], set_={"digest": digest}))

    def touch(self, digests: Iterable[str]) -> None:
        """Note that these artifacts are used now."""
        mine = artifacts.c.digest.in_(list(digests))
        with self.database.writing() as connection:
            connection.execute(update(artifacts).where(mine).values(used_at=self._now(connection)))

    def _now(self, connection: Connection) -> str:
        return self.database.now(connection).isoformat(timespec="seconds")


def step_key(kind: str, parents: Iterable[str], settings: Mapping[str, Any]) -> str:
    """Names all that decides the result of a step."""
    return sha256_of({"kind": kind, "parents": tuple(parents), "settings": settings})


def step_key_of(artifact: Artifact) -> str | None:
    """Of the step that made the artifact; None where its description tells of none."""
    settings = artifact.metadata.get("settings")
    return step_key(artifact.kind, artifact.parents, settings) if isinstance(settings, dict) else None


def _forget(connection: Connection, digests: list[str]) -> None:
    for table in (step_results, artifact_parents, artifacts):
        connection.execute(delete(table).where(table.c.digest.in_(digests)))


def _read(digest: str, description: str) -> Artifact:
    try:
        found = Artifact.from_json(description)
        if found.digest != digest:
            raise InvalidDescriptionError(f"it describes {found.digest[:12]}")
    except (InvalidDescriptionError, IntegrityError, UnsafePathError) as error:
        raise InvalidDescriptionError(
            f"The index's row of artifact {digest[:12]} is damaged ({error}). `bitsmith registry doctor --repair` "
            "writes it again from its record."
        ) from error
    return found
