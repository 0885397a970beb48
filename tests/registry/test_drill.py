"""A short version of `make drill-registry`: kills at random points, and many processes at once, on both databases."""

from pathlib import Path

import pytest

from benchmarks.registry_drill import drill_kills, drill_processes
from registry import Registry


@pytest.fixture
def places(registry: Registry, tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "work").mkdir()
    return registry.root, tmp_path / "work"


def test_kills_lose_nothing(places: tuple[Path, Path]) -> None:
    found = drill_kills(*places, num_kills=10, seed=1)
    assert found["acknowledged"] > 0


def test_processes_at_once_get_every_number_once(places: tuple[Path, Path]) -> None:
    assert drill_processes(*places, num_processes=4, num_each=5) == {"versions": 20}
