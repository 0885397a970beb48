"""What the registry knows besides bytes: artifacts and their parents, finished steps, models, versions and aliases.

Questions to a `Database`, and changes of it, each one transaction. Two processes never get the same version number: the
one that gives it out holds the model's row.
"""

from collections.abc import Collection, Iterable
from dataclasses import asdict, replace
from datetime import UTC, datetime

from sqlalchemy import Connection, Select, delete, func, literal, select, update

from registry.alias import AliasMove
from registry.artifact import Artifact
from registry.database import Database
from registry.errors import NotFoundError
from registry.schema import alias_moves, aliases, artifact_parents, artifacts, models, step_results, versions
from registry.version import Version

MOST_PARAMETERS = 500  # of one statement; SQLite's own limit was 999 once


class Index:
    """What `database` knows. Every method raises RegistryError as `Database` does."""

    def __init__(self, database: Database) -> None:
        self.database = database

    # Artifacts

    def add_artifact(self, artifact: Artifact) -> None:
        """Record an artifact and its parents, or that one that is known already was used now."""
        with self.database.writing() as connection:
            self._insert_artifact(connection, artifact)

    def artifact(self, digest: str) -> Artifact | None:
        """The artifact of that exact digest."""
        with self.database.reading() as connection:
            found = connection.scalar(select(artifacts.c.description).where(artifacts.c.digest == digest))
        return None if found is None else Artifact.from_json(found)

    def artifacts(self) -> list[tuple[Artifact, str]]:
        """All artifacts, each with the time of its last use."""
        query = select(artifacts.c.description, artifacts.c.used_at).order_by(artifacts.c.digest)
        with self.database.reading() as connection:
            return [(Artifact.from_json(description), used_at) for description, used_at in connection.execute(query)]

    def digests(self, prefix: str = "") -> list[str]:
        """All digests that start with `prefix`, sorted."""
        mine = artifacts.c.digest.startswith(prefix, autoescape=True)
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

    def forget_artifacts(self, digests: Collection[str]) -> None:
        """Drop artifacts, and the records that steps made them. No version may need one."""
        wanted = sorted(digests)
        with self.database.writing() as connection:
            for start in range(0, len(wanted), MOST_PARAMETERS):
                some = wanted[start : start + MOST_PARAMETERS]
                for table in (step_results, artifact_parents, artifacts):
                    connection.execute(delete(table).where(table.c.digest.in_(some)))

    # Steps

    def record_step(self, key: str, artifact: Artifact) -> None:
        """Record `artifact` and that it is the result of step `key`, in one transaction."""
        with self.database.writing() as connection:
            self._insert_artifact(connection, artifact)
            row = self.database.insert(step_results).values(key=key, digest=artifact.digest, created_at=_now())
            connection.execute(row.on_conflict_do_update(index_elements=["key"], set_={"digest": artifact.digest}))

    def step_result(self, key: str) -> Artifact | None:
        """The recorded result of step `key`."""
        with self.database.reading() as connection:
            digest = connection.scalar(select(step_results.c.digest).where(step_results.c.key == key))
        return None if digest is None else self.artifact(digest)

    def forget_step(self, key: str) -> None:
        """Drop the record that step `key` is done; its artifact stays."""
        with self.database.writing() as connection:
            connection.execute(delete(step_results).where(step_results.c.key == key))

    # Versions

    def add_version(self, name: str, digest: str, report_digest: str | None, note: str) -> Version:
        """Give `digest` the next number under `name`, or return the version that it already has there."""
        with self.database.writing() as connection:
            row = self.database.insert(models).values(name=name, created_at=_now())
            connection.execute(row.on_conflict_do_nothing())
            self._hold_model(connection, name)
            mine = versions.c.name == name
            known = connection.execute(select(versions).where(mine, versions.c.digest == digest)).one_or_none()
            if known is not None:
                return Version(*known)
            latest = connection.scalar(select(func.max(versions.c.version)).where(mine)) or 0
            version = Version(name, latest + 1, digest, report_digest, _now(), note)
            connection.execute(self.database.insert(versions).values(_as_row(version)))
            return version

    def version(self, name: str, number: int | None) -> Version | None:
        """One version, or the one with the highest number where `number` is None."""
        query = select(versions).where(versions.c.name == name).order_by(versions.c.version.desc()).limit(1)
        if number is not None:
            query = query.where(versions.c.version == number)
        with self.database.reading() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else Version(*row)

    def versions(self) -> list[Version]:
        """All versions, by name and number."""
        with self.database.reading() as connection:
            rows = connection.execute(select(versions).order_by(versions.c.name, versions.c.version))
            return [Version(*row) for row in rows]

    # Aliases

    def aliases(self) -> dict[str, dict[str, int]]:
        """name -> alias -> number of the version."""
        found: dict[str, dict[str, int]] = {}
        query = select(aliases).order_by(aliases.c.name, aliases.c.alias)
        with self.database.reading() as connection:
            for name, alias, number in connection.execute(query):
                found.setdefault(name, {})[alias] = number
        return found

    def move_alias(
        self, name: str, alias: str, number: int | None, *, action: str, moved_by: str, reason: str
    ) -> AliasMove:
        """Let `alias` name version `number`, or nothing where that is None, and log it, in one transaction.

        Raises:
            NotFoundError: there is no such version.
        """
        with self.database.writing() as connection:
            return self._move(connection, name, alias, number, action, moved_by, reason)

    def move_alias_back(self, name: str, alias: str, *, moved_by: str, reason: str) -> AliasMove | None:
        """Undo the last move of `alias` that is not undone yet; None where there is no version to go back to."""
        with self.database.writing() as connection:
            self._hold_model(connection, name)
            earlier = AliasMove.before([AliasMove(*row) for row in connection.execute(_moves(name, alias))])
            if earlier is None:
                return None
            return self._move(connection, name, alias, earlier, AliasMove.ROLLBACK, moved_by, reason)

    def alias_moves(self, name: str, alias: str | None = None) -> list[AliasMove]:
        """The log of one model, the oldest first."""
        with self.database.reading() as connection:
            return [AliasMove(*row) for row in connection.execute(_moves(name, alias))]

    def _move(
        self, connection: Connection, name: str, alias: str, number: int | None, action: str, by: str, reason: str
    ) -> AliasMove:
        self._hold_model(connection, name)
        mine = (aliases.c.name == name) & (aliases.c.alias == alias)
        before = connection.scalar(select(aliases.c.version).where(mine))
        if number is None:
            connection.execute(delete(aliases).where(mine))
        else:
            is_there = (versions.c.name == name) & (versions.c.version == number)
            if connection.scalar(select(versions.c.version).where(is_there)) is None:
                raise NotFoundError(f"There is no version {name}:{number}. `bitsmith registry list` shows all.")
            row = self.database.insert(aliases).values(name=name, alias=alias, version=number)
            keys = ["name", "alias"]
            connection.execute(row.on_conflict_do_update(index_elements=keys, set_={"version": number}))
        move = AliasMove(0, name, alias, action, before, number, _now(), by, reason)
        values = {column: value for column, value in asdict(move).items() if column != "number"}
        made = connection.execute(self.database.insert(alias_moves).values(values).returning(alias_moves.c.number))
        return replace(move, number=made.scalar_one())

    def _hold_model(self, connection: Connection, name: str) -> None:
        """Until the transaction ends nobody else changes versions or aliases of `name`."""
        connection.execute(select(models.c.name).where(models.c.name == name).with_for_update())

    def _insert_artifact(self, connection: Connection, artifact: Artifact) -> None:
        now = _now()
        row = self.database.insert(artifacts).values(
            digest=artifact.digest,
            kind=artifact.kind,
            description=artifact.to_json(),
            created_at=now,
            used_at=now,
        )
        connection.execute(row.on_conflict_do_update(index_elements=["digest"], set_={"used_at": now}))
        if artifact.parents:
            parents = [
                {"digest": artifact.digest, "position": position, "parent": parent}
                for position, parent in enumerate(artifact.parents)
            ]
            connection.execute(self.database.insert(artifact_parents).on_conflict_do_nothing(), parents)

    def touch(self, digests: Iterable[str]) -> None:
        """Note that these artifacts are used now."""
        with self.database.writing() as connection:
            connection.execute(update(artifacts).where(artifacts.c.digest.in_(list(digests))).values(used_at=_now()))


def _moves(name: str, alias: str | None) -> Select:
    query = select(alias_moves).where(alias_moves.c.name == name).order_by(alias_moves.c.number)
    return query if alias is None else query.where(alias_moves.c.alias == alias)


def _as_row(version: Version) -> dict[str, object]:
    return {
        "name": version.name,
        "version": version.number,
        "digest": version.digest,
        "report_digest": version.report_digest,
        "created_at": version.created_at,
        "note": version.note,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
