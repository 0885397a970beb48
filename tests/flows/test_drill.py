"""A short version of `make drill-flows`: one kill of each kind, with a server and a worker of its own."""

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["worker", "dask-worker", "child", "server"])
def test_a_kill_costs_nothing_but_time(kind: str) -> None:
    """In a process of its own, which sets Prefect up for itself."""
    command = [sys.executable, "-m", "benchmarks.flows_drill", "--times", "1", "--only", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"1 kills each of {kind}: 1 digests as undisturbed")
