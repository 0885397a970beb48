"""How much memory a process may still take."""

import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from pipeline import memory


def test_free_memory_is_not_more_than_there_is() -> None:
    assert 0 < memory.free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total


def test_a_limited_address_space_counts() -> None:
    program = "import torch; from pipeline.memory import free_bytes; print(free_bytes(torch.device('cpu')))"
    most = 6 * 2**30

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, preexec_fn=limit, check=True, capture_output=True, text=True).stdout
    assert 0 < int(printed) < most


@pytest.mark.parametrize(
    ("outer", "inner", "left"), [("max", "3000", 2000), ("1500", "max", 300), ("max", "max", None)]
)
def test_the_tightest_group_counts(tmp_path: Path, monkeypatch, outer: str, inner: str, left: int | None) -> None:
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    group = tmp_path / "job" / "step"
    group.mkdir(parents=True)
    for place, limit, used in ((group.parent, outer, "1200"), (group, inner, "1000")):
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text(f"{used}\n")
    assert memory._left_of_cgroup(group) == (psutil.virtual_memory().total if left is None else left)
