"""The damages that benchmarks/registry_damage.py drills: what each does, and what `doctor` must say of it."""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import text

from registry import Registry

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Damage:
    """One way to damage a registry.

    Attributes:
        what: in words.
        change: does it.
        named: what `doctor` must say, a regular expression.
        lost: what the last `doctor` still says, where something is lost for good.
        keeps_facts: False where versions or moves themselves are lost.
        only_sqlite: the database is a file here.
    """

    what: str
    change: Callable[[Registry], None]
    named: str
    lost: str | None = None
    keeps_facts: bool = True
    only_sqlite: bool = False


# What is done to files


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """Cut the second half off."""
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size // 2)


def garble(path: Path) -> None:
    """Make it no JSON any more."""
    path.write_bytes(path.read_bytes().replace(b'"', b"'", 1))


# Where they are


def blob(registry: Registry) -> Path:
    """Of the weights of the first version."""
    return registry.path(registry.get(registry.version("model:1").digest), "weights")


def record(registry: Registry, which: str) -> Path:
    """Of the "statistics", of the "checkpoint" or the "report" of the first version, of a "version 1" or a "move 1"."""
    version = registry.version("model:1")
    records = registry.root / "records"
    if " " in which:
        kind, number = which.split()
        return records / f"{kind}s" / "model" / f"{int(number):06d}.json"
    digest = {
        "statistics": registry.get(version.digest).parents[0],
        "checkpoint": version.digest,
        "report": version.report_digest or "",
    }[which]
    return records / "artifacts" / digest[:2] / f"{digest}.json"


def lose_index(registry: Registry) -> None:
    """Delete the database's file, or its tables."""
    database = registry._index.database
    if database.is_sqlite:
        for path in registry.root.glob("index.sqlite*"):
            path.unlink()
        return
    with database.writing() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))


def on_blob(change: Change) -> Callable[[Registry], None]:
    return lambda registry: change(blob(registry))


def on_record(which: str, change: Change, *, lost_index: bool = False) -> Callable[[Registry], None]:
    def damage(registry: Registry) -> None:
        path = record(registry, which)
        if lost_index:
            lose_index(registry)
        change(path)

    return damage


def on_index(change: Change) -> Callable[[Registry], None]:
    def damage(registry: Registry) -> None:
        with closing(sqlite3.connect(registry.root / "index.sqlite")) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        change(registry.root / "index.sqlite")

    return damage


def overwrite_pages(path: Path) -> None:
    """Zeros over the second quarter."""
    content = path.read_bytes()
    quarter = len(content) // 4
    path.write_bytes(content[:quarter] + bytes(quarter) + content[2 * quarter :])


def change_a_description(registry: Registry) -> None:
    """In the database; SQLite itself does not notice."""
    query = "UPDATE artifacts SET description = replace(description, 'weights', 'Weights') WHERE kind = 'checkpoint'"
    on_rows(query)(registry)


def on_rows(query: str) -> Callable[[Registry], None]:
    """Change rows that follow from others."""

    def change(registry: Registry) -> None:
        with registry._index.database.writing() as connection:
            connection.execute(text(query))

    return change


def restore_old_index(registry: Registry) -> None:
    """Forget in the database what was published last, as a backup from before does; the records know it."""
    version = registry.version("model:2")
    with registry._index.database.writing() as connection:
        for query in (
            "DELETE FROM aliases",
            "DELETE FROM versions WHERE version = 2",
            f"DELETE FROM artifact_parents WHERE digest IN ('{version.digest}', '{version.report_digest}')",
            f"DELETE FROM artifacts WHERE digest IN ('{version.digest}', '{version.report_digest}')",
        ):
            connection.execute(text(query))
        drop = (
            "alias_moves_no_DELETE" if registry._index.database.is_sqlite else "alias_moves_append_only ON alias_moves"
        )
        connection.execute(text(f"DROP TRIGGER {drop}"))
        connection.execute(text("DELETE FROM alias_moves"))


def interrupt_a_repair(registry: Registry) -> None:
    """What a kill leaves that comes while the index is made anew."""
    lose_index(registry)
    (registry.root / "records" / "under-way").touch()


def unknown_record(registry: Registry) -> None:
    """Of an artifact that the index does not know."""
    path = registry.root / "records" / "artifacts" / "ab" / ("ab" * 32 + ".json")
    path.parent.mkdir(exist_ok=True)
    path.write_text("{")


DAMAGES = (
    Damage("a flipped bit in a file", on_blob(flip), r"weights \(blob .* is damaged.*model:1"),
    Damage("a file cut in half", on_blob(truncate), r"weights \(blob .* is damaged.*model:1"),
    Damage("a file deleted", on_blob(Path.unlink), r"weights \(blob .* is missing.*model:1"),
    Damage("the index deleted", lose_index, "the index: is missing or empty"),
    Damage("the index emptied", on_index(lambda path: os.truncate(path, 0)), "the index: is missing", only_sqlite=True),
    Damage("the index cut in half", on_index(truncate), "is malformed", only_sqlite=True),
    Damage("the index overwritten in part", on_index(overwrite_pages), "is malformed", only_sqlite=True),
    Damage("a description changed in the index", change_a_description, "the index's row of artifact .* is damaged"),
    Damage(
        "an alias changed in the index",
        on_rows("UPDATE aliases SET version = 1"),
        "model@production: is not",
    ),
    Damage("parents removed from the index", on_rows("DELETE FROM artifact_parents"), "the index: the parents of"),
    Damage("an old index restored", restore_old_index, "the index: lacked version 2 of model"),
    Damage("a repair killed", interrupt_a_repair, "the index: was not made to its end"),
    Damage(
        "the record of an artifact deleted", on_record("checkpoint", Path.unlink), "record of artifact .* is missing"
    ),
    Damage("the record of an artifact cut", on_record("checkpoint", truncate), "record of artifact .* is damaged"),
    Damage("the record of a version deleted", on_record("version 1", Path.unlink), "record of version 1 .* is missing"),
    Damage("the record of a version garbled", on_record("version 1", garble), "record of version 1 .* is damaged"),
    Damage("the record of a move garbled", on_record("move 1", garble), "record of move 1 .* is damaged"),
    Damage("a damaged record of something unknown", unknown_record, "record of artifact abab.* is damaged"),
    Damage(
        "index lost, record of the statistics damaged",
        on_record("statistics", flip, lost_index=True),
        "record of artifact .* is damaged",
    ),
    Damage(
        "index lost, description of a version damaged",
        on_record("checkpoint", flip, lost_index=True),
        "record of artifact .* is damaged",
    ),
    Damage(
        "index lost, description of a version deleted",
        on_record("checkpoint", Path.unlink, lost_index=True),
        "the index: is missing",
    ),
    Damage(
        "index lost, description of a report damaged",
        on_record("report", truncate, lost_index=True),
        "record of artifact .* is damaged",
    ),
    Damage(
        "index lost, record of a version damaged",
        on_record("version 1", garble, lost_index=True),
        "record of version 1 of model: is damaged",
        lost="model:1: is damaged: the description of it .* is lost",
        keeps_facts=False,
    ),
    Damage(
        "index lost, record of a version deleted",
        on_record("version 1", Path.unlink, lost_index=True),
        "record of version 1 of model: is missing",
        lost="model:1: is damaged: the description of it .* is lost",
        keeps_facts=False,
    ),
    Damage(
        "index lost, record of the last version deleted, which an alias names",
        on_record("version 2", Path.unlink, lost_index=True),
        "record of version 2 of model: is missing",
        lost="model:2: is damaged: the description of it .* is lost",
        keeps_facts=False,
    ),
    Damage(
        "index lost, record of a move damaged",
        on_record("move 1", garble, lost_index=True),
        "record of move 1 of model: is damaged",
        keeps_facts=False,
    ),
)
