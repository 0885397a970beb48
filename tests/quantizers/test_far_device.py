"""Quantizers leave no tensor behind when the weight is on another device; a GPU's own tests are in test_gpu.py."""

import subprocess
import sys

import pytest
import torch


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch lets nobody make a device in Python",
)
def test_a_weight_on_another_device_is_quantized_there() -> None:
    command = [sys.executable, "-m", "tests.quantizers.on_far_device"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-2000:]}"
    assert done.stdout.count("\n") == 8
