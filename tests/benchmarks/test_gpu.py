"""`make bench-gpu` without a GPU: a dry run, and what becomes of the tables."""

import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_finetune

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_the_dry_run_trains_through_each_kind_of_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_finetune, "LABELS", ("lloyd3-g64-s8", "trellis2-l8"))
    monkeypatch.setattr(gpu_finetune, "TOKENS", 32)
    gpu_finetune.main(["--dry-run", "--layers", "1"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    named = {row[0]: row for row in rows}
    assert {"| dense, bfloat16", "| NF4, bitsandbytes", "| lloyd3-g64-s8", "| trellis2-l8"} <= named.keys()
    assert named["| lloyd3-g64-s8"][1] == named["| dense, bfloat16"][1] == f"{_num_trained():,}"


def _num_trained() -> int:
    shape, rank = gpu_finetune.TINY, 16
    sides = 4 * (2 * shape.width) + 3 * (shape.width + shape.inner)
    return rank * sides


@without_gpu
@pytest.mark.parametrize("main", [gpu.main, gpu_finetune.main])
def test_without_a_gpu_it_says_so(main) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == gpu.NO_GPU


def test_tables_of_all_modules_are_kept_and_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one of them failed, which is told."""
    for command in (["init"], ["config", "user.name", "us"], ["config", "user.email", "us@example.org"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB")
    monkeypatch.setattr(gpu, "_printed", lambda module, flags: (int(module == "gpu_model"), f"table of {module}\n"))
    with pytest.raises(SystemExit, match="failed: gpu_model; what they said"):
        gpu.main(["--commit", "--out", str(tmp_path / "results")])
    (target,) = (tmp_path / "results").iterdir()
    assert target.name.startswith("nvidia-h100-80gb-20")
    assert target.read_text() == "table of kernels\ntable of gpu_model\ntable of gpu_finetune\n"
    said = subprocess.run(["git", "log", "--stat"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "Measure on NVIDIA H100 80GB" in said
    assert target.name in said


def test_what_a_module_prints_is_shown_and_kept(capfd: pytest.CaptureFixture[str]) -> None:
    status, text = gpu._printed("kernels", ["--help"])
    assert status == 0
    assert text.startswith("usage:")
    assert text in capfd.readouterr().out
