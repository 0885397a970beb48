"""Every architecture of the table in docs/architectures.md: compressed, audited, reloaded, as planned."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.calibration import token_windows
from pipeline.compress import compress
from pipeline.model import open_model
from pipeline.packed import load_packed
from pipeline.recipe import Recipe
from pipeline.statistics import Statistics, collect_statistics
from quantizers import QuantizedLinear, quantizer_from_label
from registry import Registry
from tests.architecture_table import HEAD, row
from tests.architectures import CAUSAL, build_causal
from tests.models import save_model
from tests.pipeline.notes import Notes
from tests.pipeline.small import SMALL

pytestmark = pytest.mark.usefixtures("quick")
PAGE = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
QUICK = {"ranks": (0,), "sensitivity": "none", "candidates": ("lloyd4-g32-s6",), "eval_windows": 0}


@pytest.mark.parametrize("model_type", CAUSAL)
def test_every_matrix_is_compressed_and_comes_back(model_type: str, tmp_path: Path) -> None:
    recipe = Recipe.of(model=str(save_model(build_causal(model_type), tmp_path / "model")), **(SMALL | QUICK))
    done = compress(recipe, Registry(tmp_path / "registry"), tmp_path / "out")
    model, network = open_model(recipe.model), load_packed(done.folder)
    packed = {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    assert set(packed) == set(done.plan.matrices) == {matrix.module for matrix in model.matrices}
    skipped = json.loads((done.folder / "plan.json").read_text())["skipped"]
    assert skipped == {each.name: each.reason for each in model.skipped}
    assert all(skipped.values())
    assert set(model.tensors) == {matrix.name for matrix in model.matrices} | set(skipped) & set(model.tensors)
    for matrix in model.matrices:
        expected = quantizer_from_label("lloyd4-g32-s6").quantize(model.weight(matrix)).dequantize()
        assert torch.equal(packed[matrix.module].weight, expected), matrix.name
    assert row(model) in PAGE, "python -m tests.architecture_table > docs/architectures.md"


@pytest.mark.parametrize("model_type", CAUSAL)
def test_the_curvature_of_every_matrix_is_known(model_type: str, tmp_path: Path) -> None:
    model, notes = open_model(str(save_model(build_causal(model_type), tmp_path / "model"))), Notes()
    tokenizer = model.tokenizer()
    ends = model.task.ends(tokenizer)
    windows = token_windows(SMALL["dataset"], tokenizer, num_windows=3, seq_len=24, seed=0, ends=ends)
    (tmp_path / "work").mkdir()
    collect_statistics(model, windows, "kronecker", tmp_path / "work", seed=0, device="cpu", progress=notes)
    found = Statistics.open(lambda name: tmp_path / "work" / "out" / name)
    for matrix in model.matrices:
        learnt = found.of(matrix)
        assert learnt.input_curvature is not None
        assert learnt.input_curvature.any()
    assert not [note for note in notes.said if "tells nothing about" in note]


def test_the_table_has_no_other_rows() -> None:
    assert PAGE.startswith(HEAD)
    assert PAGE.removeprefix(HEAD).count("\n") == len(CAUSAL)
