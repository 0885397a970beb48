"""A short version of `make drill-registry`: kills at random points, and many processes at once, on both databases."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from benchmarks.hub_drill import drill_hub
from benchmarks.registry_drill import drill_kills, drill_processes
from registry import Registry

ROOT = Path(__file__).parents[2]


@pytest.fixture
def places(registry: Registry, tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "work").mkdir()
    return registry.root, tmp_path / "work"


def test_kills_lose_nothing(places: tuple[Path, Path]) -> None:
    found = drill_kills(*places, num_kills=10, seed=1)
    assert found["acknowledged"] > 0


def test_processes_at_once_get_every_number_once(places: tuple[Path, Path]) -> None:
    assert drill_processes(*places, num_processes=4, num_each=5) == {"versions": 20}


def test_kills_leave_nothing_half_there_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    counts = drill_hub(tmp_path, num_kills=6, seed=1)
    assert counts["pushes"] + counts["pulls"] == 6


@pytest.mark.slow
def test_all_drills_end_with_the_sum() -> None:
    command = "benchmarks.registry_drills --kills 2 --processes 2 --versions 2 --databases sqlite"
    environment = os.environ | {"HF_HUB_OFFLINE": "0"}  # its Hub is on the loopback interface
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.match(r"sqlite: \d+ damages all named, .*; 4 kills and 2 x 2 .* 0 lost, 0 half there\. .*disks", last), (
        last
    )
