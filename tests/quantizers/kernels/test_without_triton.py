"""Triton is wanted on a GPU, and nowhere else."""

import subprocess
import sys
from pathlib import Path


def test_the_package_works_without_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.quantizers.kernels.without_triton"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kernels do not work here (ModuleNotFoundError: No module named 'triton')" in done.stdout
    assert len(done.stdout.splitlines()) == 1
