"""Every damage is named, and mended or refused with the way out; a sound registry has none."""

import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import text

from registry import Artifact, IndexLostError, NotFoundError, Registry, RegistryError
from registry.doctor import Finding
from registry.settings import RegistrySettings
from tests.postgresql import copy_of


def build(workdir: Path) -> None:
    (workdir / "out").mkdir()
    (workdir / "out" / "file").write_bytes(b"statistics")


@pytest.fixture
def full(registry: Registry, make_folder) -> Registry:
    """A step's result, two versions made from it, a report, and an alias that moved."""
    statistics = registry.step("statistics", [], {"seed": 0}, build)
    for number in range(2):
        weights = make_folder({"weights": b"weights %d" % number, "config": b"{}"})
        checkpoint = registry.add_artifact("checkpoint", weights, [statistics.digest])
        report = registry.add_artifact("evaluation", make_folder({"report": b"%d" % number}), [checkpoint.digest])
        registry.publish("model", checkpoint, report, f"note {number}")
        registry.alias("model", "production", reason=f"reason {number}")
    return registry


def facts(registry: Registry) -> tuple[object, ...]:
    again = Registry(registry.root)
    lineage = [again.lineage(version.digest).artifacts for version in again.versions()]
    return again.versions(), again.alias_moves("model"), again.aliases("model"), lineage


def examine(registry: Registry, *, repair: bool = False) -> list[Finding]:
    return Registry.examine(registry.root, repair=repair)


def lose_index(registry: Registry) -> None:
    database = registry._index.database
    if database.is_sqlite:
        for path in registry.root.glob("index.sqlite*"):
            path.unlink()
        return
    with database.writing() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))


def test_a_sound_registry_has_no_findings(full: Registry) -> None:
    assert examine(full) == []
    assert examine(full, repair=True) == []


def test_a_lost_index_is_refused_and_made_anew(full: Registry) -> None:
    before = facts(full)
    lose_index(full)
    for use in (
        Registry.versions,
        lambda r: r.version("model"),
        lambda r: r.step("statistics", [], {"seed": 0}, build),
    ):
        with pytest.raises(IndexLostError, match="doctor --repair"):
            use(Registry(full.root))
    (found,) = examine(full)
    assert (found.what, found.is_repaired) == ("the index", False)
    with pytest.raises(IndexLostError):
        Registry(full.root).versions()
    (found,) = examine(full, repair=True)
    assert found.is_repaired
    assert facts(full) == before
    assert examine(full) == []
    again = Registry(full.root)
    assert again.has_step("statistics", [], {"seed": 0}) is not None, "steps are known again"
    assert str(again.publish("model", again.get(again.versions()[0].digest))) == "model:1"


def test_what_came_from_elsewhere_is_no_steps_result(full: Registry, make_folder) -> None:
    """It may claim any settings, those of a step that is still to run among them."""
    forged = full.add_artifact("statistics", make_folder({"file": b"forged"}), [], {"settings": {"seed": 7}})
    made = full.step("statistics", [], {"seed": 8}, build)
    lose_index(full)
    examine(full, repair=True)
    again = Registry(full.root)
    assert again.get(forged.digest) == forged
    assert again.has_step("statistics", [], {"seed": 7}) is None
    assert again.has_step("statistics", [], {"seed": 8}) == made


def test_a_rebuild_that_was_killed_is_brought_to_its_end(full: Registry, monkeypatch) -> None:
    before = facts(full)
    lose_index(full)

    def killed(self) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("registry.ledger.Ledger.take_in_records", killed)
        with pytest.raises(KeyboardInterrupt):
            examine(full, repair=True)
    with pytest.raises(IndexLostError, match="interrupted"):
        Registry(full.root).versions()
    assert [found.is_repaired for found in examine(full)] == [False]
    assert [found.is_repaired for found in examine(full, repair=True)] == [True]
    assert facts(full) == before


@pytest.fixture
def backup(registry: Registry, tmp_path: Path):
    """backup() keeps the index as it is; what it returns puts that back."""

    def keep():
        database = registry._index.database
        if database.is_sqlite:
            shutil.copyfile(registry.root / "index.sqlite", tmp_path / "backup")

            def restore() -> None:
                lose_index(registry)
                shutil.copyfile(tmp_path / "backup", registry.root / "index.sqlite")

            return restore
        url = RegistrySettings.read(registry.root).database
        assert url is not None
        copy = copy_of(url)
        return lambda: RegistrySettings(copy).write(registry.root)

    return keep


def test_an_old_index_is_brought_up_to_the_records(full: Registry, backup, make_folder) -> None:
    if full._index.database.is_sqlite:
        with sqlite3.connect(full.root / "index.sqlite") as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    restore = backup()
    third = full.add_artifact("checkpoint", make_folder({"weights": b"third"}))
    full.publish("model", third)
    full.publish("other", third)
    full.alias("model", "production")
    before = facts(full)
    restore()
    again = Registry(full.root)
    fourth = again.add_artifact("checkpoint", make_folder({"weights": b"fourth"}))
    assert str(again.publish("model", fourth)) == "model:4", "no number is given out twice"
    assert str(again.version("other")) == "other:1"
    versions, *rest = facts(full)
    assert [version for version in versions if version.digest != fourth.digest] == before[0]
    assert rest[:2] == list(before[1:3])
    assert examine(full) == []


def test_the_doctor_tells_of_an_old_index(full: Registry, backup, make_folder) -> None:
    if full._index.database.is_sqlite:
        with sqlite3.connect(full.root / "index.sqlite") as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    restore = backup()
    full.publish("model", full.add_artifact("checkpoint", make_folder({"weights": b"third"})))
    unpublished = full.add_artifact("statistics", make_folder({"s": b"unpublished"}))
    before = facts(full)
    restore()
    found = examine(full, repair=True)
    assert [finding.problem for finding in found] == ["lacked version 3 of model", "lacked 1 artifacts"]
    assert facts(full) == before
    assert Registry(full.root).get(unpublished.digest) == unpublished


@pytest.mark.parametrize("what", ["version", "move"])
def test_a_kill_between_record_and_commit_completes(what: str, full: Registry, make_folder, monkeypatch) -> None:
    third = full.add_artifact("checkpoint", make_folder({"weights": b"third"}))
    add = full._ledger._records.add

    def killed(fact) -> None:
        add(fact)
        raise KeyboardInterrupt

    monkeypatch.setattr(full._ledger._records, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        full.publish("model", third) if what == "version" else full.alias("model:1", "production")
    monkeypatch.undo()
    again = Registry(full.root)
    if what == "version":
        assert str(again.version("model")) == "model:3"
        assert str(again.publish("model", third)) == "model:3"
    else:
        assert str(again.version("model@production")) == "model:1"
        assert again.rollback("model", "production").to_version == 2
    assert examine(full) == []


def test_a_malformed_file_is_put_aside_and_made_anew(tmp_path: Path, make_folder) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish("model", registry.add_artifact("checkpoint", make_folder({"a": b"1"})))
    versions = registry.versions()
    for journal in registry.root.glob("index.sqlite-*"):
        journal.unlink()
    (registry.root / "index.sqlite").write_bytes(b"not a database" * 500)
    with pytest.raises(RegistryError, match="doctor --repair"):
        Registry(registry.root).versions()
    (found,) = examine(registry)
    assert ("malformed" in found.problem, found.is_repaired) == (True, False)
    (found,) = examine(registry, repair=True)
    assert "malformed" in found.problem
    assert found.is_repaired
    assert Registry(registry.root).versions() == versions
    assert (registry.root / "index.sqlite.damaged-1").read_bytes().startswith(b"not a database")


@pytest.mark.parametrize("damage", ["delete", "flip", "truncate"])
def test_records_are_written_again(damage: str, full: Registry) -> None:
    before = {path: path.read_bytes() for path in (full.root / "records").rglob("*.json")}
    assert len(before) == 5 + 2 + 2
    for path, content in before.items():
        if damage == "delete":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2] if damage == "truncate" else content.replace(b'"', b"'", 1))
    found = examine(full)
    assert len(found) == 9
    assert not any(finding.is_repaired for finding in found)
    assert all(finding.is_repaired for finding in examine(full, repair=True))
    assert {path: path.read_bytes() for path in (full.root / "records").rglob("*.json")} == before
    assert examine(full) == []


def test_a_record_that_says_something_else_is_not_overwritten(full: Registry) -> None:
    path = full.root / "records" / "versions" / "model" / "000001.json"
    path.write_bytes(path.read_bytes().replace(b"note 0", b"note 9"))
    (found,) = examine(full, repair=True)
    assert not found.is_repaired
    assert "note 9" in found.problem
    assert b"note 9" in path.read_bytes()


def damaged(blob: Path, damage: str) -> None:
    blob.chmod(0o644)
    content = blob.read_bytes()
    if damage == "delete":
        blob.unlink()
    elif damage == "truncate":
        os.truncate(blob, len(content) // 2)
    else:
        blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("damage", ["delete", "flip", "truncate"])
def test_damaged_files_are_named_with_their_versions_and_healed_by_the_same_bytes(
    damage: str, full: Registry, make_folder
) -> None:
    artifact = full.get(full.version("model:1").digest)
    damaged(full.path(artifact, "config"), damage)
    (found,) = examine(full)
    assert "config" in found.what
    assert "model:1, model:2" in found.advice
    assert not found.is_repaired
    (found,) = examine(full, repair=True)
    assert not found.is_repaired
    assert not full.store.has(artifact.files["config"])
    assert not full.verify("model:1").ok
    full.add_artifact("checkpoint", make_folder({"config": b"{}"}))
    assert full.verify("model:1").ok
    assert examine(full) == []


@pytest.mark.parametrize("damage", ["delete", "flip", "truncate"])
def test_a_damaged_result_that_no_version_needs_is_made_again(damage: str, registry: Registry) -> None:
    made = registry.step("statistics", [], {"seed": 0}, build)
    damaged(registry.path(made, "file"), damage)
    repaired = [finding.is_repaired for finding in examine(registry, repair=True)]
    assert repaired == ([] if damage == "delete" else [True]), "what is only missing is made again anyway"
    assert Registry(registry.root).step("statistics", [], {"seed": 0}, build) == made
    assert examine(registry) == []


def test_a_registry_older_than_the_records_gets_them(full: Registry) -> None:
    before = {path: path.read_bytes() for path in (full.root / "records").rglob("*.json")}
    shutil.rmtree(full.root / "records")
    assert len(Registry(full.root).versions()) == 2
    assert {path: path.read_bytes() for path in (full.root / "records").rglob("*.json")} == before


def test_collection_takes_the_records_too(full: Registry, make_folder) -> None:
    garbage: Artifact = full.add_artifact("matrices", make_folder({"g": b"garbage"}))
    full._uses.close()
    collected = full.collect_garbage(grace_seconds=-5)
    assert collected.artifacts == (garbage,)
    assert full._index.records.artifact(garbage.digest) is None
    assert examine(full) == []


WRONG_ROWS = {
    "an alias moved": "UPDATE aliases SET version = 1",
    "an alias removed": "DELETE FROM aliases",
    "an alias that nobody made": "INSERT INTO aliases VALUES ('model', 'staging', 1)",
    "a parent changed": "UPDATE artifact_parents SET parent = digest",
    "parents removed": "DELETE FROM artifact_parents",
    "a result swapped": "UPDATE step_results SET digest = (SELECT max(digest) FROM versions)",
}


@pytest.mark.parametrize("damage", WRONG_ROWS)
def test_tables_that_follow_from_others_are_compared_and_written_again(damage: str, full: Registry) -> None:
    made, before = full.has_step("statistics", [], {"seed": 0}), facts(full)
    with full._index.database.writing() as connection:
        connection.execute(text(WRONG_ROWS[damage]))
    for dry_run in (True, False):
        with pytest.raises(RegistryError, match=r"Nothing was removed\. Run `bitsmith registry doctor --repair`"):
            full.collect_garbage(grace_seconds=0, dry_run=dry_run)
    assert examine(full)
    assert not any(finding.is_repaired for finding in examine(full))
    assert all(finding.is_repaired for finding in examine(full, repair=True))
    assert examine(full) == []
    assert facts(full) == before
    assert Registry(full.root).has_step("statistics", [], {"seed": 0}) == made
    assert full.collect_garbage(grace_seconds=0).artifacts == ()


@pytest.mark.parametrize("repair", [False, True])
def test_a_registry_that_is_not_there_is_not_made(repair: bool, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="There is no registry in"):
        Registry.examine(tmp_path / "nowhere", repair=repair)
    assert not (tmp_path / "nowhere").exists()
