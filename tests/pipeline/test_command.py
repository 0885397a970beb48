"""The printed command, parsed by the real command line, gives the recipe back."""

import shlex
from typing import Any

import pytest
import typer

from pipeline.arguments import recipes_of
from pipeline.cli import app
from pipeline.command import compress_command, evaluate_command
from pipeline.recipe import Recipe

RECIPES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "fast": {"preset": "fast"},
    "fast, more samples": {"preset": "fast", "num_samples": 32},
    "text": {"dataset": "my notes/it's me.txt", "seed": 7, "seq_len": 128},
    "hub": {"dataset": "user/data:config", "dataset_revision": "abc", "revision": "main"},
    "choices": {"candidates": ("lloyd3-g64-s4", "nf4-g64-s8"), "ranks": (0,), "share_groups": True},
    "ranks": {"ranks": (2, 16), "factor_bits": (4, 8)},
    "overrides": {"overrides": (("down_proj$", "nf4-g64-s8"), ("a=b", "lloyd2-g64-s4"))},
    "recovery": {
        "recover": True,
        "recover_steps": 7,
        "recover_samples": 9,
        "recover_learning_rate": 2e-4,
        "recover_kl_weight": 0.5,
        "recover_hidden_weight": 2.0,
        "recover_ce_weight": 0.1,
        "recover_train": ("norms", "biases"),
    },
    "best": {"preset": "best"},
    "best without recovery": {"preset": "best", "recover": False},
    "unweighted": {"sensitivity": "none", "eval_windows": 0, "solver": "cbc"},
}


def _parse(command: str, line: str) -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    words = shlex.split(line)
    assert words[:2] == ["bitsmith", command]
    return group.commands[command].make_context(command, words[2:]).params


@pytest.mark.parametrize("settings", RECIPES.values(), ids=RECIPES)
def test_command_gives_the_recipe_back(settings: dict[str, Any]) -> None:
    recipe = Recipe.of(model="user/model", budget="3.0bpw", **settings)
    arguments = _parse("compress", compress_command(recipe.to_json() | {"bitsmith": "1", "model_sha256": "x"}))
    assert recipes_of(arguments) == [recipe]


def test_command_of_a_preset_is_short() -> None:
    recipe = Recipe.of("fast", model="demo", budget="40%").to_json()
    assert compress_command(recipe) == "bitsmith compress demo --budget 40% -o OUT --preset fast"


def test_evaluate_command_names_the_original_and_the_windows() -> None:
    recipe = Recipe.of(model="user/model", budget="3bpw", eval_windows=5).to_json() | {"model_commit": "f" * 40}
    arguments = _parse("evaluate", evaluate_command(recipe))
    assert arguments["base"] == "user/model"
    assert arguments["base_revision"] == "f" * 40
    assert (arguments["num_windows"], arguments["seq_len"]) == (5, 512)


def test_branches_of_the_hub_are_the_commits_that_they_were() -> None:
    recipe = Recipe.of(model="user/tiny", budget="3bpw", revision="main", dataset="user/text").to_json()
    command = compress_command(recipe | {"model_commit": "a" * 40, "calibration_commit": "b" * 40})
    assert f"--revision {'a' * 40} " in command
    assert f"--dataset-revision {'b' * 40}" in command
