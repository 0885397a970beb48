"""Every architecture of the table in docs/architectures.md: compressed, audited, reloaded, as planned."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.compress import compress
from pipeline.model import open_model
from pipeline.packed import load_packed
from pipeline.recipe import Recipe
from quantizers import QuantizedLinear, quantizer_from_label
from registry import Registry
from tests.architecture_table import HEAD, row
from tests.architectures import CAUSAL, build_causal
from tests.models import save_model
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


def test_the_table_has_no_other_rows() -> None:
    assert PAGE.startswith(HEAD)
    assert PAGE.removeprefix(HEAD).count("\n") == len(CAUSAL)
