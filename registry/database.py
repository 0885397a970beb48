"""The database behind the index: SQLite in a file, or PostgreSQL by its URL.

SQLite runs in write-ahead mode, and a writer begins with BEGIN IMMEDIATE: writers come one after the other, and a
reader never waits for one. In PostgreSQL writers of different rows run side by side; who must not, locks a row.
"""

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import URL, Connection, Table, create_engine, event, inspect, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from registry.errors import DiskFullError, IndexLostError, RegistryError, SchemaError
from registry.lock import exclusive, flocked
from registry.schema import REVISIONS

BUSY_TIMEOUT_SECONDS = 60
# libpq's own names: a server that is silent is given up within a minute, where the URL names no other patience
PATIENCE = {
    "connect_timeout": 20,  # seconds
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 4,
    "tcp_user_timeout": 60_000,  # milliseconds
}
NEEDED_BYTES = 1 << 20  # SQLite wants some beside its file even to read
_MIGRATION_LOCK, _COLLECTION_LOCK = 7_210_001, 7_210_002  # advisory locks of PostgreSQL; any numbers of our own
_LEGACY_TABLE = "registry_schema"  # before Alembic: one number, always 1


class Database:
    """A database with the tables of schema.py, made or brought up to date when this is made.

    Every method raises RegistryError, naming the database, where it is locked, damaged, unreachable or unwritable.

    Args:
        url: of SQLite's file (`sqlite_url`) or `postgresql://user@host/name`.
        may_be_made: make the tables where there are none, instead of raising IndexLostError.
    Raises:
        IndexLostError: there are no tables and none may be made.
        RegistryError: the URL names another kind of database, or psycopg is missing.
        SchemaError: the database was written by a newer version of the program.
    """

    def __init__(self, url: str | URL, *, may_be_made: bool = True) -> None:
        self._url = checked_url(url)
        self._held = threading.local()
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        patience = {} if self.is_sqlite else {name: PATIENCE[name] for name in PATIENCE.keys() - self._url.query.keys()}
        try:
            self._engine = create_engine(self._url, poolclass=NullPool, connect_args=patience)
        except ImportError as error:
            raise RegistryError(
                f"The registry's database {self.name} needs {error.name}. Install it with "
                "`pip install 'bitsmith[postgres]'`."
            ) from error
        if self.is_sqlite:
            event.listen(self._engine, "connect", _configure)
            event.listen(self._engine, "begin", _begin)
        self._prepare(may_be_made)

    @property
    def name(self) -> str:
        """For messages; without a password."""
        return str(self._url.database) if self.is_sqlite else self._url.render_as_string(hide_password=True)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that does not write."""
        with self._errors(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A transaction that reads several tables as they were at one moment."""
        engine = self._engine
        if not self.is_sqlite:  # whose transactions all are
            engine = engine.execution_options(isolation_level="REPEATABLE READ")
        with self._errors(), engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction, committed at the end and undone by an exception."""
        writer = self._engine.execution_options(bitsmith_begin="BEGIN IMMEDIATE")
        with self._errors(), writer.begin() as connection:
            yield connection

    def insert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        """An insert that knows `on_conflict_do_nothing` and `on_conflict_do_update`."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def now(self, connection: Connection) -> datetime:
        """By the database's clock, which is one for all machines."""
        query = "SELECT extract(epoch FROM clock_timestamp())"
        if self.is_sqlite:
            query = "SELECT (julianday('now') - 2440587.5) * 86400"
        return datetime.fromtimestamp(float(connection.scalar(text(query))), UTC)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Nobody is `collecting` while any number of processes are in here."""
        with self._collection(exclusively=False):
            yield

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Alone: nobody else is in here, nor `keeping`."""
        with self._collection(exclusively=True):
            yield

    @contextmanager
    def _collection(self, *, exclusively: bool) -> Iterator[None]:
        if getattr(self._held, "depth", 0):  # a second lock of one thread could wait for a collector that waits for it
            assert not exclusively, "this thread keeps what it would collect"
            yield
            return
        self._held.depth = 1
        try:
            with self._locked(exclusively):
                yield
        finally:
            self._held.depth = 0

    @contextmanager
    def _locked(self, exclusively: bool) -> Iterator[None]:
        if self.is_sqlite:
            with flocked(self._beside("collection.lock"), exclusively=exclusively):
                yield
            return
        with ExitStack() as stack:
            with self._errors():
                connection = stack.enter_context(self._engine.connect())
                # held by this connection's session, and gone with it
                lock = f"pg_advisory_lock{'' if exclusively else '_shared'}({_COLLECTION_LOCK})"
                connection.execute(text(f"SELECT {lock}"))
                connection.rollback()
            yield  # what is done meanwhile has errors of its own

    def _prepare(self, may_be_made: bool) -> None:
        if not may_be_made and self.is_sqlite and not Path(self.name).exists():
            raise self._lost()
        with self.reading() as connection:
            found = _revision(connection)
            is_empty = found is None and not inspect(connection).has_table(_LEGACY_TABLE)
        if is_empty and not may_be_made:
            raise self._lost()
        if found == REVISIONS[-1]:
            return
        if found is not None and found not in REVISIONS:
            raise SchemaError(
                f"The registry's database {self.name} has schema {found}, and this program knows schemas up to "
                f"{REVISIONS[-1]}. It was written by a newer bitsmith: upgrade with "
                "`pip install --upgrade bitsmith`, or choose another registry with BITSMITH_HOME."
            )
        with exclusive(self._beside("migration.lock")) if self.is_sqlite else nullcontext():
            self._upgrade()

    def _lost(self) -> IndexLostError:
        return IndexLostError(
            f"The registry's database {self.name} is missing or empty, but the records beside the blobs tell of "
            "versions: it was deleted, or BITSMITH_HOME or registry.toml names the wrong place. Restore it, or run "
            "`bitsmith registry doctor --repair`, which makes it anew from them."
        )

    def _upgrade(self) -> None:
        from alembic import command
        from alembic.config import Config

        if self.is_sqlite:
            with self._errors():
                raw = self._engine.raw_connection()
                try:
                    raw.cursor().execute("PRAGMA journal_mode=WAL")  # kept in the file; not possible in a transaction
                finally:
                    raw.close()
        with self.writing() as connection:
            if not self.is_sqlite:
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
            config = Config()
            config.set_main_option("script_location", "registry:migrations")
            config.attributes["connection"] = connection
            if _revision(connection) is None and inspect(connection).has_table(_LEGACY_TABLE):
                command.stamp(config, REVISIONS[0])
            command.upgrade(config, "head")

    def _beside(self, suffix: str) -> Path:
        path = Path(str(self._url.database))
        return path.with_name(f"{path.name}.{suffix}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:  # the second from `_upgrade`'s raw connection
            cause = " ".join(str(getattr(error, "orig", None) or error).split())
            said = f"The registry's database {self.name} cannot be used ({cause})."
            if self._is_disk_full():
                advice = "The disk is full: free some space, or point BITSMITH_HOME at a larger disk."
                raise DiskFullError(f"{said} {advice}") from error
            raise RegistryError(f"{said} {self._advice()}") from error

    def _is_disk_full(self) -> bool:
        if self.is_sqlite:
            with suppress(OSError):
                return shutil.disk_usage(Path(self.name).parent).free < NEEDED_BYTES
        return False

    def _advice(self) -> str:
        return (
            f"If it is locked, another bitsmith has been writing for over {BUSY_TIMEOUT_SECONDS} s: wait for it. If it "
            "does not answer or is read-only, mend that. If it is malformed: `bitsmith registry doctor --repair`."
        )


def sqlite_url(path: Path) -> URL:
    """Of the file `path`, whatever characters are in it."""
    return URL.create("sqlite", database=str(path))


def sqlite_path(url: str | URL) -> Path | None:
    """The file of a SQLite database; None for another kind."""
    found = checked_url(url)
    return Path(str(found.database)) if found.get_backend_name() == "sqlite" else None


def checked_url(url: str | URL) -> URL:
    """The URL with the driver that is used. Raises RegistryError: it is none of an index, or shows a secret."""
    try:
        found = make_url(url)
    except ArgumentError:
        found = None
    if found is None or found.get_backend_name() not in ("sqlite", "postgresql"):
        raise RegistryError(
            "The registry's database must be given as sqlite:///path or postgresql://user@host/name. Mend "
            "--database, or the line in registry.toml; without it the index is a SQLite file in the registry's folder."
        )
    if secrets := sorted({"password", "sslpassword"} & set(found.query)):
        raise RegistryError(
            f"The URL of the registry's database has {' and '.join(secrets)} behind the question mark, which would be "
            "shown in messages. Write postgresql://user:password@host/name, or leave it to PGPASSWORD or ~/.pgpass."
        )
    return found.set(drivername="postgresql+psycopg") if found.get_backend_name() == "postgresql" else found


def _revision(connection: Connection) -> str | None:
    """What Alembic wrote; None in a database without its table."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.scalar(text("SELECT version_num FROM alembic_version"))


def _configure(connection, _record) -> None:
    connection.isolation_level = None  # the transactions are ours (`_begin`), not the driver's
    connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_SECONDS * 1000}")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("bitsmith_begin", "BEGIN"))
