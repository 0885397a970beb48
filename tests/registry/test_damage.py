"""Damages of all kinds: each is named, and repaired or refused with the way out, and nothing else changes."""

import shutil
from pathlib import Path

import pytest
from sqlalchemy import text

from benchmarks.registry_damage import drill, make, make_named
from benchmarks.registry_damages import DAMAGES, Damage, flip, garble, lose_index, record, truncate, unknown_record
from registry import InvalidDescriptionError, NotFoundError, Registry

# every third on PostgreSQL; `make drill-registry` does them all on both
CASES = [(damage, "sqlite") for damage in DAMAGES]
CASES += [(damage, "postgresql") for damage in DAMAGES[::3] if not damage.only_sqlite]


@pytest.mark.parametrize(
    ("damage", "database"), CASES, indirect=["database"], ids=[f"{each.what}-{where}" for each, where in CASES]
)
def test_damages_are_named_and_mended(damage: Damage, registry: Registry) -> None:
    make_named(registry)
    drill(registry, damage)


@pytest.fixture
def named(registry: Registry) -> Registry:
    make_named(registry)
    registry._uses.close()
    return registry


def num_blobs(registry: Registry) -> int:
    return len(list(registry.store.blobs()))


def test_a_damaged_record_that_only_the_records_know_stops_a_collection(named: Registry) -> None:
    unknown_record(named)
    before = num_blobs(named)
    with pytest.raises(InvalidDescriptionError, match=r"abab.*\.json is damaged.*doctor --repair"):
        named.collect_garbage(grace_seconds=-5)
    assert num_blobs(named) == before
    Registry.examine(named.root, repair=True)
    assert named.collect_garbage(grace_seconds=-5).num_blobs == 0
    (aside,) = (named.root / "records" / "damaged").iterdir()
    assert aside.read_text() == "{"


def test_a_lost_description_costs_no_file_and_heals_with_its_record(named: Registry, tmp_path: Path) -> None:
    path, version = record(named, "checkpoint"), named.version("model:1")
    shutil.copyfile(path, tmp_path / "backup")
    weights = named.path(named.get(version.digest), "weights")
    lose_index(named)
    truncate(path)
    left = [str(finding) for finding in Registry.examine(named.root, repair=True) if not finding.is_repaired]
    assert len(left) == 1
    assert left[0].startswith(f"model:1: is damaged: the description of it ({version.digest[:12]}) is lost")
    again = Registry(named.root)
    assert again.versions()[0] == version, "it keeps its number and is not dropped silently"
    assert again.version("model@production").number == 2
    for use in (
        lambda: again.verify("model:1"),
        lambda: again.get(version.digest),
        lambda: again.lineage(version.digest),
    ):
        with pytest.raises(NotFoundError, match="doctor"):
            use()
    assert again.collect_garbage(grace_seconds=-5).num_blobs == 0
    assert weights.exists(), "nobody knows any more that it belongs to a version, and it stays"
    assert [finding.what for finding in Registry.examine(named.root)] == ["model:1"], "until it is mended"
    shutil.copyfile(tmp_path / "backup", path)
    assert [finding.is_repaired for finding in Registry.examine(named.root)] == [True]
    assert Registry.examine(named.root) == []
    assert again.verify("model:1").ok


def test_versions_made_from_what_is_lost_are_named_once(named: Registry) -> None:
    path = record(named, "statistics")
    lose_index(named)
    garble(path)
    mended = Registry.examine(named.root, repair=True)
    assert [finding.is_repaired for finding in mended] == [True, True, False]
    assert mended[2].what == "model:1, model:2"
    assert "which it was made from" in mended[2].problem
    assert Registry(named.root).verify("model:1").ok
    assert Registry.examine(named.root) == []


def test_a_damaged_row_whose_record_is_damaged_too_is_lost(named: Registry) -> None:
    digest, path = named.version("model:1").digest, record(named, "checkpoint")
    with named._index.database.writing() as connection:
        connection.execute(text("UPDATE artifacts SET description = 'x' WHERE digest = :digest"), {"digest": digest})
    with pytest.raises(InvalidDescriptionError, match="doctor --repair"):
        named.get(digest)
    flip(path)
    Registry.examine(named.root, repair=True)
    assert [finding.what for finding in Registry.examine(named.root)] == ["model:1"]
    make(Registry(named.root))
    assert Registry.examine(named.root) == []


def test_every_record_may_be_damaged_at_once(named: Registry) -> None:
    lose_index(named)
    for path in (named.root / "records").rglob("*.json"):
        truncate(path)
    assert any(finding.is_repaired for finding in Registry.examine(named.root, repair=True))
    again = Registry(named.root)
    assert [version.number for version in again.versions()] == [1, 2]
    assert num_blobs(again) == 6
    make(again)
    assert [str(version) for version in again.versions()] == ["model:1", "model:2", "model:3", "model:4"]
    assert again.verify("model:3").ok
    assert again.verify("model:4").ok


@pytest.mark.parametrize("name", ["what?", "a#b", "100%", "50%25 off", "with space", "a?b=c&d#e", "größe"])
def test_a_folder_of_any_name_holds_a_registry(name: str, tmp_path: Path) -> None:
    root = tmp_path / name
    make_named(Registry(root))
    assert (root / "index.sqlite").is_file()
    assert len(Registry(root).versions()) == 2
    assert Registry.examine(root) == []
    assert [path.name for path in tmp_path.iterdir()] == [name]
