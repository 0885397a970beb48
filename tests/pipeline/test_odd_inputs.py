"""The default way through (curvature, feedback, trellis) with weights, shapes and texts that nobody wishes for."""

import html
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.calibration import token_windows
from pipeline.compress import Compressed, compress
from pipeline.curvature_sums import Metric
from pipeline.errors import BudgetError
from pipeline.model import Matrix, open_model
from pipeline.packed import load_packed
from pipeline.recipe import PRESETS, Recipe
from pipeline.statistics import Statistics, collect_statistics
from registry import Registry
from tests.models import build_llama, save_model
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


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_strange_matrices_under_the_other_presets(preset: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Zeros, rank one and an outlier, each in another matrix of one model; with recovery where the preset has it."""
    places = {"self_attn.v_proj": torch.zeros_like, "self_attn.q_proj": torch.ones_like, "mlp.down_proj": outlier}
    model = tiny_model_dir
    for number, (name, change) in enumerate(places.items()):
        model = changed(model, tmp_path / f"model{number}", change, f"model.layers.0.{name}.weight")
    kept = {name: PRESETS[preset][name] for name in ("candidates", "sensitivity")}
    recovery = {"recover": True, "recover_samples": 4, "recover_steps": 2} if preset == "best" else {}
    done = default_run(model, tmp_path, **kept, **recovery)
    assert all(torch.isfinite(layer).all() for layer in load_packed(done.folder).state_dict().values())
    assert done.evaluation is not None
    assert done.evaluation.kl_divergence.mean < 1


@pytest.mark.parametrize("width", [1, 3, 37])
def test_dimensions_that_divide_by_nothing(width: int, tiny_tokenizer, tmp_path: Path) -> None:
    network = build_llama(hidden_size=60, intermediate_size=width)
    model = save_model(network, tmp_path / "model", tokenizer=tiny_tokenizer)
    done = default_run(model, tmp_path, budget="5bpw", ranks=(1,))
    assert done.plan.bits_per_param <= 5
    assert all(torch.isfinite(layer).all() for layer in load_packed(done.folder).state_dict().values())


@pytest.mark.parametrize("folder", ["odd_model_dir", "tiny_gpt2_dir"])
def test_odd_shapes(folder: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    done = default_run(request.getfixturevalue(folder), tmp_path, budget="5bpw", ranks=(1,))
    assert done.plan.bits_per_param <= 5


@pytest.mark.parametrize("metric", ["kronecker", "sequence", "guided", "kl", "input", "fisher", "factored"])
@pytest.mark.parametrize("num_samples", [1, 4], ids="{} windows".format)
def test_errors_of_which_the_text_tells_nothing_count_like_others(
    metric: Metric, num_samples: int, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = changed(tiny_model_dir, tmp_path / "m", torch.zeros_like, "model.layers.0.self_attn.v_proj.weight")
    model, notes = open_model(str(folder)), Notes()
    windows = token_windows(SMALL["dataset"], model.tokenizer(), num_windows=num_samples, seq_len=32, seed=0)
    (tmp_path / "work").mkdir()
    collect_statistics(model, windows, metric, tmp_path / "work", seed=0, device="cpu", progress=notes)
    without_gradient = [] if metric in ("input", "kl") else ["q", "k"]
    names = [f"model.layers.0.self_attn.{kind}_proj.weight" for kind in (*without_gradient, "o")]
    (told,) = [note for note in notes.said if "tells nothing about" in note]
    assert told.partition(" about ")[2].partition(":")[0] == ", ".join(names)
    statistics = Statistics.open(lambda name: tmp_path / "work" / "out" / name)
    levels = {matrix.name: importance_of(statistics, matrix) for matrix in model.matrices}
    others = [float(level.mean()) for name, level in levels.items() if name not in names]
    for name in names:
        torch.testing.assert_close(levels[name], levels[name].mean().expand_as(levels[name]))
        assert min(others) < float(levels[name].mean()) < max(others)


def test_what_the_text_does_not_tell_is_said_to_all_who_use_the_statistics(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = changed(tiny_model_dir, tmp_path / "m", torch.zeros_like, "model.layers.0.self_attn.v_proj.weight")
    said = []
    for budget in ("3.5bpw", "4bpw"):
        notes = Notes()
        recipe = Recipe.of(model=str(model), **SMALL | {"budget": budget})
        done = compress(recipe, Registry(tmp_path / "registry"), tmp_path / budget, progress=notes)
        (told,) = [note for note in notes.said if "tells nothing about" in note]
        said.append(told)
        assert told in html.unescape((done.folder / "report" / "index.html").read_text(encoding="utf-8"))
    assert said[0] == said[1]


def importance_of(statistics: Statistics, matrix: Matrix) -> torch.Tensor:
    return statistics.of(matrix).importance(matrix.shape[0])


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
