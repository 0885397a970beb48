"""An older database is brought up to date, a newer or damaged one refused, and the log of aliases cannot be changed."""

import socket
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from registry import Artifact, Registry, RegistryError, SchemaError
from registry.database import PATIENCE, Database
from registry.schema import REVISIONS, metadata
from registry.settings import RegistrySettings
from tests.registry.silent_server import silent_server

# As the first releases made it.
LEGACY = """
CREATE TABLE registry_schema (number INTEGER NOT NULL PRIMARY KEY);
INSERT INTO registry_schema VALUES (1);
CREATE TABLE artifacts (digest VARCHAR(64) NOT NULL PRIMARY KEY, kind VARCHAR NOT NULL, description VARCHAR NOT NULL,
    created_at VARCHAR NOT NULL);
CREATE TABLE artifact_parents (digest VARCHAR(64) NOT NULL REFERENCES artifacts (digest), position INTEGER NOT NULL,
    parent VARCHAR(64) NOT NULL, PRIMARY KEY (digest, position));
CREATE INDEX ix_artifact_parents_parent ON artifact_parents (parent);
CREATE TABLE step_results (key VARCHAR(64) NOT NULL PRIMARY KEY, digest VARCHAR(64) NOT NULL
    REFERENCES artifacts (digest), created_at VARCHAR NOT NULL);
CREATE TABLE models (name VARCHAR(96) NOT NULL PRIMARY KEY, created_at VARCHAR NOT NULL);
CREATE TABLE versions (name VARCHAR(96) NOT NULL REFERENCES models (name), version INTEGER NOT NULL,
    digest VARCHAR(64) NOT NULL REFERENCES artifacts (digest), report_digest VARCHAR(64) REFERENCES artifacts (digest),
    created_at VARCHAR NOT NULL, note VARCHAR NOT NULL, PRIMARY KEY (name, version), UNIQUE (name, digest));
"""


def test_the_revisions_are_those_of_the_scripts() -> None:
    config = Config()
    config.set_main_option("script_location", "registry:migrations")
    assert tuple(script.revision for script in ScriptDirectory.from_config(config).walk_revisions())[::-1] == REVISIONS


def test_a_new_database_has_exactly_the_tables_of_the_schema(registry: Registry) -> None:
    with registry._index.database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_a_database_of_the_first_releases_is_brought_up_to_date(registry: Registry, checkpoint: Artifact) -> None:
    registry.publish("model", checkpoint, note="old")
    with registry._index.database.reading() as connection:
        dialect = connection.dialect.name
        rows = {t: connection.execute(text(f"SELECT * FROM {t}")).all() for t in ("artifact_parents", "models")}
        artifact = connection.execute(text("SELECT digest, kind, description, created_at FROM artifacts")).one()
        version = connection.execute(text("SELECT * FROM versions")).one()
    with registry._index.database.writing() as connection:
        for table in ("alias_moves", "aliases", "versions", "models", "step_results", "artifact_parents", "artifacts"):
            connection.execute(text(f"DROP TABLE {table}"))
        connection.execute(text("DROP TABLE alembic_version"))
        if dialect == "postgresql":
            connection.execute(text("DROP FUNCTION alias_moves_refuse"))
        for statement in LEGACY.split(";\n"):
            if statement.strip():
                connection.execute(text(statement))
        connection.execute(text("INSERT INTO artifacts VALUES (:a, :b, :c, :d)"), _named(artifact))
        for table, found in rows.items():
            for row in found:
                places = ", ".join(f":{name}" for name in _named(row))
                connection.execute(text(f"INSERT INTO {table} VALUES ({places})"), _named(row))
        connection.execute(text("INSERT INTO versions VALUES (:a, :b, :c, :d, :e, :f)"), _named(version))
    again = Registry(registry.root)
    assert [(str(found), found.digest, found.note) for found in again.versions()] == [
        ("model:1", checkpoint.digest, "old")
    ]
    assert again.verify("model").ok
    again.alias("model", "production")
    test_a_new_database_has_exactly_the_tables_of_the_schema(again)


def test_a_newer_database_is_refused(registry: Registry, checkpoint: Artifact) -> None:
    with registry._index.database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaError, match="upgrade"):
        Registry(registry.root).versions()


def test_a_damaged_file_is_a_registry_error(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    assert registry.versions() == []
    for journal in registry.root.glob("index.sqlite-*"):
        journal.unlink()
    (registry.root / "index.sqlite").write_bytes(b"not a database" * 500)
    with pytest.raises(RegistryError, match=r"index\.sqlite cannot be used"):
        Registry(registry.root).versions()


ROW = "INTO alias_moves VALUES ('model', 1, 'production', 'set', NULL, 1, 'then', 'nobody', '')"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE alias_moves SET moved_by = 'nobody'",
        "DELETE FROM alias_moves",
        f"INSERT OR REPLACE {ROW}",
        f"INSERT {ROW} ON CONFLICT (name, number) DO UPDATE SET moved_by = 'nobody'",
    ],
)
def test_the_log_of_aliases_can_only_grow(statement: str, registry: Registry, checkpoint: Artifact) -> None:
    registry.publish("model", checkpoint)
    registry.alias("model", "production")
    if "OR REPLACE" in statement and not registry._index.database.is_sqlite:
        pytest.skip("SQLite's own")
    with pytest.raises(RegistryError, match="append-only"), registry._index.database.writing() as connection:
        connection.execute(text(statement))
    assert len(registry.alias_moves("model")) == 1


def test_an_older_sqlite_file_comes_to_refuse_replaced_moves_too(tmp_path: Path, make_folder) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish("model", registry.add_artifact("checkpoint", make_folder({"a": b"1"})))
    registry.alias("model", "production")
    with registry._index.database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0002'"))
        connection.execute(text("DROP TRIGGER alias_moves_no_replace"))
    again = Registry(registry.root)
    with pytest.raises(RegistryError, match="append-only"), again._index.database.writing() as connection:
        connection.execute(text(f"INSERT OR REPLACE {ROW}"))
    assert again.alias_moves("model") == registry.alias_moves("model")


def test_two_processes_may_make_the_database_at_once(tmp_path: Path, database: str | None) -> None:
    RegistrySettings(database).write(tmp_path / "registry")
    failed: list[Exception] = []
    start = threading.Barrier(6)

    def make() -> None:
        try:
            start.wait(30)
            assert Registry(tmp_path / "registry").versions() == []
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []


def test_a_server_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    RegistrySettings("postgresql://ann:secret@127.0.0.1:1/models").write(tmp_path)
    with pytest.raises(
        RegistryError, match=r"postgresql\+psycopg://ann:\*\*\*@127\.0\.0\.1:1/models cannot"
    ) as refused:
        Registry(tmp_path).versions()
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("name", ["password", "sslpassword"])
def test_a_password_in_the_query_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(RegistryError, match=rf"has {name} behind the question mark") as refused:
        Database(f"postgresql://127.0.0.1:1/models?user=ann&{name}=s3cret")
    assert "s3cret" not in str(refused.value)


def test_the_name_of_an_index_shows_nothing_of_how_it_is_reached(tmp_path: Path) -> None:
    settings = RegistrySettings("postgresql://ann:secret@host/models?password=private&sslmode=require")
    assert settings.index_name(tmp_path) == "postgresql://host/models?sslmode=require"


def test_other_indexes_have_other_names(tmp_path: Path) -> None:
    urls = [
        "postgresql:///models?host=db1",
        "postgresql:///models?host=db2",
        "postgresql:///models",
        "sqlite:////srv/x",
    ]
    names = [RegistrySettings(url).index_name(tmp_path) for url in urls]
    assert len(set(names)) == 4
    here = f" on {socket.gethostname()}"
    assert [name.endswith(here) for name in names] == [False, False, True, True]  # other hosts have such, too


@pytest.mark.parametrize("url", ["mysql://host/models", "models.sqlite", ""])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(RegistryError, match="must be given as sqlite"):
        Database(url)


@pytest.mark.parametrize("text", ["database = 3", "databas = 'x'", "database = ", "\xff"])
def test_settings_that_cannot_be_read_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "registry.toml").write_text(text, encoding="latin-1")
    with pytest.raises(RegistryError, match=r"registry\.toml cannot be read"):
        Registry(tmp_path).versions()


def test_settings_are_read_as_they_were_written(tmp_path: Path) -> None:
    settings = RegistrySettings('postgresql://a@/b?host=/x y"\\z')
    settings.write(tmp_path)
    assert RegistrySettings.read(tmp_path) == settings


def test_a_database_locked_for_too_long_is_a_registry_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("registry.database.BUSY_TIMEOUT_SECONDS", 0)
    registry = Registry(tmp_path / "registry")
    assert registry.versions() == []
    with sqlite3.connect(registry.root / "index.sqlite", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RegistryError, match="locked"):
            Registry(registry.root).add_artifact("plan", _folder(tmp_path))
        other.execute("ROLLBACK")


def _named(row: Sequence[object]) -> dict[str, object]:
    return {chr(ord("a") + place): value for place, value in enumerate(row)}


def _folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"1")
    return tmp_path / "folder"


def test_a_server_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PATIENCE, "connect_timeout", 2)  # the least that libpq takes
    with silent_server() as server:
        with pytest.raises(RegistryError, match=rf"{server.port}/models cannot be used \(.*timeout expired"):
            Database(f"postgresql://somebody@127.0.0.1:{server.port}/models")
        monkeypatch.setitem(PATIENCE, "connect_timeout", 600)
        with pytest.raises(RegistryError, match="timeout expired"):  # what the URL says comes first
            Database(f"postgresql://somebody@127.0.0.1:{server.port}/models?connect_timeout=2")
