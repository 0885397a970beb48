"""The command line that repeats a recipe: the preset nearest to it, and a flag for every other difference."""

import shlex
from typing import Any

from pipeline.recipe import PRESETS, Recipe

# settings whose flag is not their name
_REPEATED_FLAGS = {"candidates": "--candidate", "overrides": "--override", "ranks": "--rank"}


def compress_command(recipe: dict[str, Any]) -> str:
    """`bitsmith compress ...` for a recipe.json, with branches of the Hub as the commits that they were.

    Other facts in it that are no settings are left out.
    """
    recipe = recipe | pinned(recipe)
    settings = {key: value for key, value in recipe.items() if key in Recipe.model_fields}
    preset = min(PRESETS, key=lambda name: (len(_changes(settings, name)), name != "default"))
    words = ["bitsmith", "compress", settings["model"], "--budget", settings["budget"], "-o", "OUT"]
    words += ["--preset", preset] * (preset != "default")
    for key, value in _changes(settings, preset).items():
        words += _flag(key, value)
    return " ".join(shlex.quote(str(word)) for word in words)


def pinned(recipe: dict[str, Any], evaluation: dict[str, Any] | None = None) -> dict[str, str]:
    """Of a recipe.json, the settings that name a commit, as far as those are known; `evaluation` is report.json's."""
    commits = {
        "revision": recipe.get("model_commit"),
        "dataset_revision": recipe.get("calibration_commit"),
        "eval_dataset_revision": evaluation.get("text_commit") if evaluation else None,
    }
    return {key: commit for key, commit in commits.items() if commit}


def evaluate_command(recipe: dict[str, Any]) -> str:
    """`bitsmith evaluate ...` that measures what the run of a recipe.json measured."""
    words = ["bitsmith", "evaluate", "OUT", "--base", recipe["model"]]
    commit = recipe.get("model_commit") or recipe.get("revision")
    flags = {
        "--base-revision": commit,
        "--dataset": recipe.get("eval_dataset"),
        "--dataset-revision": recipe.get("eval_dataset_revision"),
        "--num-windows": recipe["eval_windows"],
        "--seq-len": recipe["eval_seq_len"],
    }
    words += [word for flag, value in flags.items() if value is not None for word in (flag, value)]
    words += ["--trust-remote-code"] * bool(recipe.get("trust_remote_code"))
    return " ".join(shlex.quote(str(word)) for word in words)


def _changes(settings: dict[str, Any], preset: str) -> dict[str, Any]:
    """Settings that differ from the preset's, in the recipe's order; model and budget are always given."""
    defaults = {key: field.default for key, field in Recipe.model_fields.items()} | PRESETS[preset]
    return {
        key: settings[key]
        for key, default in defaults.items()
        if key in settings and key not in ("model", "budget") and _plain(settings[key]) != _plain(default)
    }


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _flag(key: str, value: Any) -> list[str]:
    flag = _REPEATED_FLAGS.get(key, f"--{key.replace('_', '-')}")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list | tuple):
        entries = ("=".join(entry) if isinstance(entry, list | tuple) else str(entry) for entry in value)
        return [word for entry in entries for word in (flag, entry)]
    return [flag, str(value)]
