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
    ("line", "folder", "files"),
    [
        ("0::/job/step", "job/step", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:memory:/job/step",
            "memory/job/step",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
@pytest.mark.parametrize(
    ("outer", "inner", "left"), [("2000000", "3000", 2400), ("1500", "2000000", 700), ("max", "3000", 2400)]
)
def test_the_tightest_group_counts(
    tmp_path: Path, monkeypatch, line: str, folder: str, files: tuple[str, str, str], outer: str, inner: str, left: int
) -> None:
    """Without what is only cached of files, which the system gives back."""
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_own_groups", lambda: ["9:name=systemd:/", line])
    group = tmp_path / folder
    group.mkdir(parents=True)
    for place, limit, used in ((group.parent, outer, "1200"), (group, inner, "1000")):
        for name, text in zip(files, (limit, used), strict=False):
            (place / name).write_text(f"{text}\n")
        (place / "memory.stat").write_text(f"cache 900\n{files[2]} 400\n")
    assert memory.free_bytes(torch.device("cpu")) == left


def test_a_group_without_limits_limits_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_own_groups", lambda: ["0::/job"])
    assert memory.free_bytes(torch.device("cpu")) > 2**20
