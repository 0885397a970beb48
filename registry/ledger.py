"""Versions and aliases: numbers that are given out once, and moves that are logged, in the database and in `records`.

Whoever changes a name holds its row, takes in what the records have and the database lacks (after a kill just before a
commit, or in a database from a backup), adds the row, writes the record, and commits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from sqlalchemy import Connection, Select, Table, delete, func, select

from registry.alias import AliasMove
from registry.database import Database
from registry.errors import NotFoundError
from registry.index import Index
from registry.records import Records
from registry.schema import alias_moves, aliases, models, versions
from registry.version import Version


class Ledger:
    """Of one registry. Methods raise RegistryError as `Database` and `Records` do."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._database: Database = index.database
        self._records: Records = index.records

    # Versions

    def add_version(self, name: str, digest: str, report_digest: str | None, note: str) -> Version:
        """Give `digest` the next number under `name`, or return the version that it already has there."""
        with self._holding(name) as connection:
            mine = (versions.c.name == name) & (versions.c.digest == digest)
            known = connection.execute(select(versions).where(mine)).one_or_none()
            if known is not None:
                return Version(*known)
            number = _last(connection, versions, name) + 1
            version = Version(name, number, digest, report_digest, self._now(connection), note)
            self._insert_version(connection, version)
            self._records.add(version)
            return version

    def version(self, name: str, number: int | None) -> Version | None:
        """One version, or the one with the highest number where `number` is None."""
        query = select(versions).where(versions.c.name == name).order_by(versions.c.version.desc()).limit(1)
        if number is None:
            self._catch_up([name])
        else:
            query = query.where(versions.c.version == number)
        row = self._first(query)
        if row is None and number is not None:
            self._catch_up([name])
            row = self._first(query)
        return None if row is None else Version(*row)

    def versions(self) -> list[Version]:
        """All versions, by name and number."""
        self._catch_up(self._records.names())
        with self._database.reading() as connection:
            rows = connection.execute(select(versions).order_by(versions.c.name, versions.c.version))
            return [Version(*row) for row in rows]

    # Aliases

    def aliases(self, name: str) -> dict[str, int]:
        """alias -> number of the version."""
        self._catch_up([name])
        query = select(aliases.c.alias, aliases.c.version).where(aliases.c.name == name).order_by(aliases.c.alias)
        with self._database.reading() as connection:
            return {row.alias: row.version for row in connection.execute(query)}

    def all_aliases(self) -> dict[str, dict[str, int]]:
        """name -> alias -> number of the version."""
        self._catch_up(self._records.names())
        found: dict[str, dict[str, int]] = {}
        with self._database.reading() as connection:
            for row in connection.execute(select(aliases).order_by(aliases.c.name, aliases.c.alias)):
                found.setdefault(row.name, {})[row.alias] = row.version
        return found

    def move_alias(
        self, name: str, alias: str, number: int | None, *, action: str, moved_by: str, reason: str
    ) -> AliasMove:
        """Let `alias` name version `number`, or nothing where that is None, and log it.

        Raises:
            NotFoundError: there is no such version.
        """
        with self._holding(name) as connection:
            return self._move(connection, name, alias, number, action, moved_by, reason)

    def move_alias_back(self, name: str, alias: str, *, moved_by: str, reason: str) -> AliasMove | None:
        """Undo the last move of `alias` that is not undone yet; None where there is no version to go back to."""
        with self._holding(name) as connection:
            earlier = AliasMove.before([AliasMove(*row) for row in connection.execute(_log(name, alias))])
            if earlier is None:
                return None
            return self._move(connection, name, alias, earlier, AliasMove.ROLLBACK, moved_by, reason)

    def moves(self, name: str, alias: str | None = None) -> list[AliasMove]:
        """The log of one name, the oldest first."""
        self._catch_up([name])
        with self._database.reading() as connection:
            return [AliasMove(*row) for row in connection.execute(_log(name, alias))]

    # Records

    def take_in_records(self) -> None:
        """Add to the database every version and move that only the records have."""
        self._catch_up(self._records.names())

    def write_alias_again(self, name: str, alias: str) -> None:
        """Let `alias` name what the log of its moves says."""
        with self._holding(name) as connection:
            moves = [AliasMove(*row) for row in connection.execute(_log(name, alias))]
            self._set_alias(connection, name, alias, moves[-1].to_version if moves else None)

    def facts(self) -> list[Version | AliasMove]:
        """All that the database knows, records or not."""
        with self._database.reading() as connection:
            all_versions = [Version(*row) for row in connection.execute(select(versions))]
            return [*all_versions, *(AliasMove(*row) for row in connection.execute(select(alias_moves)))]

    def _catch_up(self, names: list[str]) -> None:
        with self._database.reading() as connection:
            last = {table.name: _last_of(connection, table, names) for table in (versions, alias_moves)}
        for name in names:
            next_version, next_move = (last[table.name].get(name, 0) + 1 for table in (versions, alias_moves))
            if self._records.has(Version, name, next_version) or self._records.has(AliasMove, name, next_move):
                with self._holding(name):
                    pass

    @contextmanager
    def _holding(self, name: str) -> Iterator[Connection]:
        """A transaction in which nobody else changes `name`, and the database knows all that the records know."""
        with self._database.writing() as connection:
            row = self._database.insert(models).values(name=name, created_at=self._now(connection))
            connection.execute(row.on_conflict_do_nothing())
            connection.execute(select(models.c.name).where(models.c.name == name).with_for_update())
            number = _last(connection, versions, name)
            while version := self._records.read(Version, name, number := number + 1):
                for digest in filter(None, (version.digest, version.report_digest)):
                    self._require(connection, digest)
                self._insert_version(connection, version)
            number = _last(connection, alias_moves, name)
            while move := self._records.read(AliasMove, name, number := number + 1):
                self._insert_move(connection, move)
            yield connection

    def _require(self, connection: Connection, digest: str) -> None:
        if self._index.is_known(connection, digest):
            return
        artifact = self._records.artifact(digest)
        if artifact is None:  # the version keeps its number; `doctor` names it
            self._index.mark_lost(connection, digest)
        else:
            self._index.insert_artifact(connection, artifact)

    def _move(
        self, connection: Connection, name: str, alias: str, number: int | None, action: str, by: str, reason: str
    ) -> AliasMove:
        mine = (aliases.c.name == name) & (aliases.c.alias == alias)
        before = connection.scalar(select(aliases.c.version).where(mine))
        is_there = (versions.c.name == name) & (versions.c.version == number)
        if number is not None and connection.scalar(select(versions.c.version).where(is_there)) is None:
            raise NotFoundError(f"There is no version {name}:{number}. `bitsmith registry list` shows all.")
        position = _last(connection, alias_moves, name) + 1
        move = AliasMove(name, position, alias, action, before, number, self._now(connection), by, reason)
        self._insert_move(connection, move)
        self._records.add(move)
        return move

    def _insert_move(self, connection: Connection, move: AliasMove) -> None:
        connection.execute(self._database.insert(alias_moves).values(asdict(move)))
        self._set_alias(connection, move.name, move.alias, move.to_version)

    def _set_alias(self, connection: Connection, name: str, alias: str, number: int | None) -> None:
        connection.execute(delete(aliases).where((aliases.c.name == name) & (aliases.c.alias == alias)))
        if number is not None:
            connection.execute(self._database.insert(aliases).values(name=name, alias=alias, version=number))

    def _insert_version(self, connection: Connection, version: Version) -> None:
        values = asdict(version)
        values["version"] = values.pop("number")
        connection.execute(self._database.insert(versions).values(values))

    def _now(self, connection: Connection) -> str:
        return self._database.now(connection).isoformat(timespec="seconds")

    def _first(self, query: Select):
        with self._database.reading() as connection:
            return connection.execute(query).one_or_none()


def _number(table: Table):
    return table.c.version if table is versions else table.c.number


def _last(connection: Connection, table: Table, name: str) -> int:
    return connection.scalar(select(func.max(_number(table))).where(table.c.name == name)) or 0


def _last_of(connection: Connection, table: Table, names: list[str]) -> dict[str, int]:
    query = select(table.c.name, func.max(_number(table)).label("last")).group_by(table.c.name)
    if len(names) == 1:
        query = query.where(table.c.name == names[0])
    return {row.name: row.last for row in connection.execute(query)}


def _log(name: str, alias: str | None) -> Select:
    query = select(alias_moves).where(alias_moves.c.name == name).order_by(alias_moves.c.number)
    return query if alias is None else query.where(alias_moves.c.alias == alias)
