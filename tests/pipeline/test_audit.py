"""What the audit must catch: a folder that loads, talks, and is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.audit import NUM_TOKENS, answer_in_fresh_process, audit, fixed_answer
from pipeline.compress import compress
from pipeline.errors import CheckpointError
from pipeline.packed import load_packed
from pipeline.recipe import Recipe
from registry import Registry
from tests.models import VOCAB_SIZE
from tests.pipeline.small import SMALL


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("audited")
    recipe = Recipe.of(model=str(tiny_model_dir), **(SMALL | {"eval_windows": 0, "sensitivity": "none"}))
    return compress(recipe, Registry(place / "registry"), place / "out").folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_sound_folder_gives_the_answer_of_the_model_in_memory(folder: Path) -> None:
    """That it passes is seen when `folder` is made."""
    reloaded, in_memory = answer_in_fresh_process(folder), fixed_answer(load_packed(folder))
    assert reloaded.shape == (NUM_TOKENS - 1, VOCAB_SIZE)
    assert reloaded.std() > 0
    torch.testing.assert_close(reloaded, in_memory)


def test_changed_codes_change_the_answer(folder: Path, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.weight_packed"))
    tensors[name] = ~tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="gives another answer"):
        audit(copy, fixed_answer(load_packed(folder)))


def test_a_missing_tensor_is_named(folder: Path, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("norm.weight"))
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        audit(copy, fixed_answer(load_packed(folder)))


def test_a_plan_that_names_other_sizes_is_caught(folder: Path, copy: Path) -> None:
    plan = json.loads((copy / "plan.json").read_text())
    first = next(iter(plan["matrices"]))
    plan["matrices"][first]["size_bits"] += 32
    (copy / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(CheckpointError, match=first):
        audit(copy, fixed_answer(load_packed(folder)))
