"""Kernels compile for a card: Triton and its assembler make sm_90 code without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantizers.kernels.configs import CONFIGS, DEFAULT
from quantizers.kernels.layout import PLANE_BITS

SHARED_BYTES = 227 * 1024  # of an H100, for one program


def compiled(folder: Path, *arguments: str) -> dict[str, dict]:
    """By name, what the program of compile_sm90.py printed; `folder` is an empty cache."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.quantizers.kernels.compile_sm90", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["name"]: line for line in lines}


def check(variants: dict[str, dict]) -> None:
    for name, found in variants.items():
        assert found["cubin_bytes"] > 1000
        assert found["shared_bytes"] <= SHARED_BYTES
        on_tensor_cores = name.startswith(("matmul", "trellis_product")) and str(torch.float32) not in name
        assert (found["mma"] > 0) == on_tensor_cores


def test_each_kernel_compiles(tmp_path: Path) -> None:
    variants = compiled(tmp_path, "--few")
    assert {name.partition(",")[0] for name in variants} == {
        *CONFIGS[DEFAULT],
        "trellis",
        "viterbi",
        "scale_search",
        "column_feedback",
    }
    check(variants)


@pytest.mark.slow
def test_every_width_compiles(tmp_path: Path) -> None:
    variants = compiled(tmp_path)
    for kernel in CONFIGS[DEFAULT]:
        for bits in PLANE_BITS:
            if not kernel.startswith("trellis"):
                assert any(name.startswith(f"{kernel}, {bits} bits") for name in variants)
    check(variants)
