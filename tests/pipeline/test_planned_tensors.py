"""A stored version whose tensors, configuration and plan do not agree is named, although every hash is right."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.compress import compress
from pipeline.errors import CheckpointError
from pipeline.planned_tensors import check_planned
from pipeline.recipe import Recipe
from registry import Registry
from tests.pipeline.small import SMALL

MODULE = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, quick: None) -> Path:
    place = tmp_path_factory.mktemp("planned")
    compress(Recipe.of(model=str(tiny_model_dir), **SMALL), Registry(place / "registry"), place / "out", name="tiny")
    registry = Registry(place / "registry")
    registry.materialize(registry.get(registry.version("tiny").digest), place / "files")
    return place / "files"


@pytest.fixture
def check(folder: Path, tmp_path: Path) -> Callable[[str, Callable], int]:
    """check("plan.json", change) publishes a copy with that file changed, and checks it."""

    def call(name: str, change: Callable) -> int:
        copy = tmp_path / "copy"
        copy.mkdir()
        for path in folder.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        if name.endswith(".safetensors"):
            tensors = load_file(copy / name)
            change(tensors)
            save_file(tensors, copy / name, metadata={"format": "pt"})
        else:
            content = json.loads((copy / name).read_text())
            change(content)
            (copy / name).write_text(json.dumps(content))
        registry = Registry(tmp_path / "registry")
        version = registry.publish("copy", registry.add_artifact("checkpoint", copy))
        assert registry.verify("copy").ok
        return check_planned(registry, version)

    return call


def test_a_sound_version_is_as_planned(check) -> None:
    assert check("plan.json", lambda plan: None) == 14


def replaced(name: str, change: Callable) -> Callable:
    def call(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return call


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", lambda t: t.pop(f"{MODULE}.weight_packed"), "hold nothing"),
        ("model.safetensors", replaced(f"{MODULE}.weight_packed", lambda t: t[:-1].clone()), "should be"),
        ("model.safetensors", replaced(f"{MODULE}.weight_packed", lambda t: t.to(torch.int64)), "should be"),
        ("plan.json", lambda plan: plan["matrices"][MODULE].update(label="nf8"), "was planned as nf8"),
        ("plan.json", lambda plan: plan["matrices"][MODULE].update(size_bits=8), "was planned with 8 bits"),
        ("plan.json", lambda plan: plan["matrices"].pop(MODULE), "disagree about"),
        ("config.json", lambda config: config.pop("quantization_config"), "does not describe"),
        ("config.json", lambda config: config["quantization_config"]["matrices"].pop(MODULE), "disagree about"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_agree_is_named(file: str, change: Callable, message: str, check) -> None:
    with pytest.raises(CheckpointError, match=message):
        check(file, change)
