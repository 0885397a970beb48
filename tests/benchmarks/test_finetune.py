"""The benchmark's rows on a tiny model: the same number of trained parameters, and losses that are losses."""

import json
from pathlib import Path

import pytest

from benchmarks.finetune import measured
from tests.models import build_llama
from tests.pipeline.test_finetune import ROWS, checkpoint_of


def test_packed_and_dense_rows_are_trained_alike(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(build_llama(), tmp_path, ranks=(0,))
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    found = {
        row: measured(row, checkpoint, str(tmp_path / "model"), str(dataset), steps=2)
        for row in ("packed, zero", "dense, float32")
    }
    packed, dense = found["packed, zero"], found["dense, float32"]
    assert packed["num_trained"] == dense["num_trained"] > 0
    assert packed["bits"] < 5 < dense["bits"]
    assert packed["start"] == pytest.approx(dense["start"], rel=0.1)
    assert all(row["kept"] <= row["start"] for row in found.values())
