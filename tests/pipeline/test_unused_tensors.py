"""Stored tensors that the model's own class does not load: of another task's head, of a layer for drafting."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.compress import compress
from pipeline.errors import CheckpointError
from pipeline.packed import load_packed
from pipeline.recipe import Recipe
from registry import Registry
from tests.architectures import build_causal
from tests.models import save_model
from tests.pipeline.small import SMALL

pytestmark = pytest.mark.usefixtures("quick")
LLAMA = {
    "score.weight": (2, 64),
    "model.extra": (5,),
    "model.layers.9.mlp.up_proj.weight": (48, 32),  # of a layer that config.json does not have
}
BERT = {"bert.pooler.dense.weight": (32, 32), "bert.pooler.dense.bias": (32,), "cls.seq_relationship.weight": (2, 32)}


def _with(added: dict[str, tuple[int, ...]], folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(shape) for name, shape in added.items()}, path, {"format": "pt"})
    return folder


def _another_layer(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of a mixture of experts: stored under other names than it would be loaded under, many tensors for one."""
    stored = load_file(folder / "model.safetensors")
    return {
        name.replace(".layers.1.", ".layers.9."): tuple(tensor.shape)
        for name, tensor in stored.items()
        if ".layers.1." in name
    }


@pytest.mark.parametrize("kind", ["llama", "bert", "mixtral"])
def test_they_are_copied_and_the_rest_is_compressed(kind: str, tmp_path: Path) -> None:
    model = save_model(build_causal(kind), tmp_path / "model")
    added = {"llama": LLAMA, "bert": BERT}.get(kind) or _another_layer(model)
    _with(added, model)
    recipe = Recipe.of(model=str(model), **SMALL | {"ranks": (0,), "sensitivity": "none", "budget": "6bpw"})
    done = compress(recipe, Registry(tmp_path / "registry"), tmp_path / "out")
    reasons = json.loads((done.folder / "plan.json").read_text())["skipped"]
    assert {name: reasons[name] for name in added} == dict.fromkeys(added, "not used by the architecture")
    (path,) = done.folder.glob("*.safetensors")
    with safe_open(path, framework="pt") as stored:
        assert set(added) <= set(stored.keys())
    load_packed(done.folder)

    save_file(load_file(path) | {"made.up": torch.ones(3)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected keys: made\.up"):
        load_packed(done.folder)
