"""The default way through (curvature, feedback, trellis) with weights, shapes and texts that nobody wishes for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.calibration import token_windows
from pipeline.compress import Compressed, compress
from pipeline.curvature_sums import Metric
from pipeline.errors import BudgetError
from pipeline.model import open_model
from pipeline.packed import load_packed
from pipeline.recipe import PRESETS, Recipe
from pipeline.statistics import collect_statistics
from registry import Registry
from tests.pipeline.notes import Notes
from tests.pipeline.small import SMALL

pytestmark = pytest.mark.usefixtures("quick")


def default_run(model: Path, place: Path, **changes: object) -> Compressed:
    """With the default recipe's metric and candidates."""
    settings = SMALL | {"candidates": PRESETS["default"]["candidates"], "budget": "3.5bpw"} | changes
    return compress(Recipe.of(model=str(model), **settings), Registry(place / "registry"), place / "out")


def changed(model: Path, folder: Path, change, *names: str) -> Path:
    """A copy of the model with some of its weights changed."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors |= {name: change(tensors[name].clone()) for name in names}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def outlier(weight: torch.Tensor) -> torch.Tensor:
    weight[3, 5] = 1e4 * weight.abs().max()
    return weight


@pytest.mark.parametrize("change", [torch.zeros_like, torch.ones_like, outlier], ids=["zeros", "rank one", "outlier"])
def test_strange_matrices_end_in_a_valid_checkpoint(change, tiny_model_dir: Path, tmp_path: Path) -> None:
    names = ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj")
    model = changed(tiny_model_dir, tmp_path / "model", change, *(f"{name}.weight" for name in names))
    done = default_run(model, tmp_path)
    packed = load_packed(done.folder)
    for name in names:
        weight = packed.get_submodule(name).weight
        assert torch.isfinite(weight).all()
        if change is torch.zeros_like:
            assert not weight.any()
    assert done.evaluation is not None
    assert done.evaluation.kl_divergence.mean < 1


@pytest.mark.parametrize("folder", ["odd_model_dir", "tiny_gpt2_dir"])
def test_odd_shapes(folder: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    done = default_run(request.getfixturevalue(folder), tmp_path, budget="5bpw", ranks=(1,))
    assert done.plan.bits_per_param <= 5


@pytest.mark.parametrize("metric", ["kronecker", "sequence", "kl", "input"])
@pytest.mark.parametrize("num_samples", [1, 4], ids="{} windows".format)
def test_inputs_that_are_always_zero_are_told_of(
    metric: Metric, num_samples: int, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = changed(tiny_model_dir, tmp_path / "m", torch.zeros_like, "model.layers.0.self_attn.v_proj.weight")
    model, notes = open_model(str(folder)), Notes()
    windows = token_windows(SMALL["dataset"], model.tokenizer(), num_windows=num_samples, seq_len=32, seed=0)
    (tmp_path / "work").mkdir()
    collect_statistics(model, windows, metric, tmp_path / "work", seed=0, device="cpu", progress=notes)
    told = [note.partition(": ")[0] for note in notes.said if "tells nothing about its inputs" in note]
    attention = "model.layers.0.self_attn"
    idle = (
        [] if metric in ("input", "kl") else [f"{attention}.q_proj.weight", f"{attention}.k_proj.weight"]
    )  # no gradient
    assert told == [*idle, f"{attention}.o_proj.weight"]


@pytest.mark.parametrize("metric", ["fisher", "factored"])
def test_matrices_without_a_gradient_are_told_of(metric: Metric, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = changed(tiny_model_dir, tmp_path / "m", torch.zeros_like, "model.layers.0.self_attn.v_proj.weight")
    model, notes = open_model(str(folder)), Notes()
    windows = token_windows(SMALL["dataset"], model.tokenizer(), num_windows=2, seq_len=32, seed=0)
    (tmp_path / "work").mkdir()
    collect_statistics(model, windows, metric, tmp_path / "work", seed=0, device="cpu", progress=notes)
    told = [note.partition(": ")[0] for note in notes.said if "no gradient reaches it" in note]
    assert told == [f"model.layers.0.self_attn.{kind}_proj.weight" for kind in ("q", "k", "o")]


def test_a_text_of_one_repeated_token(tiny_model_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a " * 4000)
    done = default_run(tiny_model_dir, tmp_path, dataset=str(text))
    assert done.plan.bits_per_param <= 3.5
    assert all(torch.isfinite(layer).all() for layer in load_packed(done.folder).state_dict().values())


def test_a_budget_that_only_one_candidate_meets(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"smallest plan takes (\d+\.\d+)") as refused:
        default_run(tiny_model_dir, tmp_path, budget="0.5bpw")
    smallest = str(refused.value).partition("at least ")[2].partition("bpw")[0]
    done = default_run(tiny_model_dir, tmp_path, budget=f"{smallest}bpw")
    assert {matrix["label"] for matrix in json.loads((done.folder / "plan.json").read_text())["matrices"].values()} == {
        "trellis1-l12"
    }
