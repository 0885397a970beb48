"""The drills of `make drill-*`, with few kills."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_few_kills_of_compress() -> None:
    command = [sys.executable, "-m", "benchmarks.compress_drill", "--kills", "3"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[-1].startswith("3 kills of compress: all ")
