"""What the registry knows besides bytes: artifacts and their parents, finished steps, models and versions.

One SQLite file in write-ahead mode. A writer begins with BEGIN IMMEDIATE, so that two processes never give
out the same version number; a reader never waits for a writer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import (
    Column,
    Connection,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    func,
    inspect,
    literal,
    select,
)
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from registry.artifact import Artifact
from registry.errors import RegistryError, SchemaError
from registry.lock import exclusive
from registry.version import Version

SCHEMA_NUMBER = 1
BUSY_TIMEOUT_SECONDS = 60

_metadata = MetaData()
_schema = Table("registry_schema", _metadata, Column("number", Integer, primary_key=True))
_artifacts = Table(
    "artifacts",
    _metadata,
    Column("digest", String(64), primary_key=True),
    Column("kind", String, nullable=False),
    Column("description", String, nullable=False),  # the artifact's canonical JSON
    Column("created_at", String, nullable=False),
)
# A parent may be unknown here: a pulled version names parents that stayed on another machine.
_parents = Table(
    "artifact_parents",
    _metadata,
    Column("digest", ForeignKey("artifacts.digest"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("parent", String(64), nullable=False, index=True),
)
_steps = Table(
    "step_results",
    _metadata,
    Column("key", String(64), primary_key=True),
    Column("digest", ForeignKey("artifacts.digest"), nullable=False),
    Column("created_at", String, nullable=False),
)
_models = Table(
    "models",
    _metadata,
    Column("name", String(96), primary_key=True),
    Column("created_at", String, nullable=False),
)
_versions = Table(
    "versions",
    _metadata,
    Column("name", ForeignKey("models.name"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("digest", ForeignKey("artifacts.digest"), nullable=False),
    Column("report_digest", ForeignKey("artifacts.digest")),
    Column("created_at", String, nullable=False),
    Column("note", String, nullable=False),
    UniqueConstraint("name", "digest"),
)


class Index:
    """The database at `path`, made if it is missing.

    Every method raises RegistryError, with the path, where the database is locked, damaged or unwritable.

    Raises:
        SchemaError: the database was written by a newer version of the program.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
        event.listen(self._engine, "connect", _configure)
        event.listen(self._engine, "begin", _begin)
        self._prepare()

    def add_artifact(self, artifact: Artifact) -> None:
        """Record an artifact and its parents; one that is known already is left as it is."""
        with self._writing() as connection:
            _insert_artifact(connection, artifact)

    def artifact(self, digest: str) -> Artifact | None:
        """The artifact of that exact digest."""
        with self._reading() as connection:
            found = connection.scalar(select(_artifacts.c.description).where(_artifacts.c.digest == digest))
        return None if found is None else Artifact.from_json(found)

    def digests(self, prefix: str = "") -> list[str]:
        """All digests that start with `prefix`, sorted."""
        mine = _artifacts.c.digest.startswith(prefix, autoescape=True)
        query = select(_artifacts.c.digest).where(mine).order_by(_artifacts.c.digest)
        with self._reading() as connection:
            return list(connection.scalars(query.where(_artifacts.c.digest.startswith(prefix, autoescape=True))))

    def ancestors(self, digest: str) -> list[str]:
        """`digest` and all that it was made from, nearest first, known here or not."""
        line = select(literal(digest).label("digest"), literal(0).label("depth")).cte("line", recursive=True)
        step = select(_parents.c.parent, line.c.depth + 1).join(line, _parents.c.digest == line.c.digest)
        line = line.union(step)
        query = select(line.c.digest).group_by(line.c.digest).order_by(func.min(line.c.depth), line.c.digest)
        with self._reading() as connection:
            return list(connection.scalars(query))

    def record_step(self, key: str, artifact: Artifact) -> None:
        """Record `artifact` and that it is the result of step `key`, in one transaction."""
        with self._writing() as connection:
            _insert_artifact(connection, artifact)
            row = insert(_steps).values(key=key, digest=artifact.digest, created_at=_now())
            connection.execute(row.on_conflict_do_update(index_elements=["key"], set_={"digest": artifact.digest}))

    def step_result(self, key: str) -> Artifact | None:
        """The recorded result of step `key`."""
        with self._reading() as connection:
            digest = connection.scalar(select(_steps.c.digest).where(_steps.c.key == key))
        return None if digest is None else self.artifact(digest)

    def forget_step(self, key: str) -> None:
        """Drop the record that step `key` is done; its artifact stays."""
        with self._writing() as connection:
            connection.execute(delete(_steps).where(_steps.c.key == key))

    def add_version(self, name: str, digest: str, report_digest: str | None, note: str) -> Version:
        """Give `digest` the next number under `name`, or return the version that it already has there."""
        with self._writing() as connection:
            mine = _versions.c.name == name
            known = connection.execute(select(_versions).where(mine, _versions.c.digest == digest)).one_or_none()
            if known is not None:
                return Version(*known)
            connection.execute(insert(_models).values(name=name, created_at=_now()).on_conflict_do_nothing())
            latest = connection.scalar(select(func.max(_versions.c.version)).where(mine)) or 0
            version = Version(name, latest + 1, digest, report_digest, _now(), note)
            connection.execute(insert(_versions).values(_as_row(version)))
            return version

    def version(self, name: str, number: int | None) -> Version | None:
        """One version, or the one with the highest number where `number` is None."""
        query = select(_versions).where(_versions.c.name == name).order_by(_versions.c.version.desc()).limit(1)
        if number is not None:
            query = query.where(_versions.c.version == number)
        with self._reading() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else Version(*row)

    def versions(self) -> list[Version]:
        """All versions, by name and number."""
        with self._reading() as connection:
            rows = connection.execute(select(_versions).order_by(_versions.c.name, _versions.c.version))
            return [Version(*row) for row in rows]

    def _prepare(self) -> None:
        """Make the tables, one process at a time, or check that they are of the kind that this code knows."""
        with self._errors(), exclusive(self._path.with_name(self._path.name + ".lock")):
            with self._engine.connect() as connection:
                fresh = not inspect(connection).has_table(_schema.name)
                number = None if fresh else connection.scalar(select(func.max(_schema.c.number)))
            if fresh:
                self._create_tables()
            elif number is None or number > SCHEMA_NUMBER:
                raise SchemaError(
                    f"The registry at {self._path} has schema {number}, and this program knows schemas up to "
                    f"{SCHEMA_NUMBER}. It was written by a newer bitsmith: upgrade with "
                    "`pip install --upgrade bitsmith`, or choose another registry with BITSMITH_HOME."
                )

    def _create_tables(self) -> None:
        raw = self._engine.raw_connection()
        try:
            raw.cursor().execute("PRAGMA journal_mode=WAL")  # kept in the file; not possible in a transaction
        finally:
            raw.close()
        with self._writing() as connection:
            _metadata.create_all(connection)
            connection.execute(insert(_schema).values(number=SCHEMA_NUMBER))

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._errors(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        writer = self._engine.execution_options(bitsmith_begin="BEGIN IMMEDIATE")
        with self._errors(), writer.begin() as connection:
            yield connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            cause = getattr(error, "orig", None) or error
            raise RegistryError(
                f"The registry's database {self._path} cannot be used ({cause}). If it is locked, another "
                f"bitsmith has been writing for over {BUSY_TIMEOUT_SECONDS} s: wait for it. If it is "
                "read-only or the disk is full, mend that. If it is malformed, restore it from a backup."
            ) from error


def _insert_artifact(connection: Connection, artifact: Artifact) -> None:
    row = insert(_artifacts).values(
        digest=artifact.digest, kind=artifact.kind, description=artifact.to_json(), created_at=_now()
    )
    connection.execute(row.on_conflict_do_nothing())
    if artifact.parents:
        parents = [
            {"digest": artifact.digest, "position": position, "parent": parent}
            for position, parent in enumerate(artifact.parents)
        ]
        connection.execute(insert(_parents).on_conflict_do_nothing(), parents)


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


def _configure(connection, _record) -> None:
    connection.isolation_level = None  # the transactions are ours (`_begin`), not the driver's
    connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_SECONDS * 1000}")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("bitsmith_begin", "BEGIN"))
