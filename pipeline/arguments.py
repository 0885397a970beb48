"""From a command's arguments to recipes: one for each budget."""

from typing import TYPE_CHECKING, Any

from pipeline.budget import parse_budgets
from pipeline.errors import RecipeError

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

_SAME_NAME = (
    *("model", "revision", "trust_remote_code"),
    *("dataset", "dataset_revision", "num_samples", "seq_len", "seed", "sensitivity"),
    *("recover", "recover_samples", "recover_steps", "recover_learning_rate"),
    *("recover_kl_weight", "recover_hidden_weight", "recover_ce_weight"),
    *("embeddings", "share_groups", "cost_rows", "solver"),
    *("eval_dataset", "eval_dataset_revision", "eval_windows", "eval_seq_len"),
)


def recipes_of(arguments: dict[str, Any]) -> "list[Recipe]":
    """The recipes that a command's parameters, by name, ask for, in the order of the budgets.

    Raises:
        BudgetError, RecipeError: a setting is malformed or out of range.
    """
    budgets = parse_budgets(arguments["budget"])
    settings = _settings(arguments)
    from pipeline.recipe import Recipe

    return [Recipe.of(arguments["preset"], **settings, budget=budget.text) for budget in budgets]


def _settings(arguments: dict[str, Any]) -> dict[str, Any]:
    settings = {key: arguments[key] for key in _SAME_NAME if key in arguments}
    settings["candidates"] = tuple(arguments["candidate"]) if arguments["candidate"] else None
    settings["recover_train"] = tuple(arguments.get("recover_train") or ()) or None
    settings["ranks"] = tuple(arguments["rank"] or ()) or None
    settings["factor_bits"] = tuple(arguments["factor_bits"] or ()) or None
    settings["overrides"] = tuple(map(_override, arguments["override"])) if arguments["override"] else None
    return settings


def _override(text: str) -> tuple[str, str]:
    pattern, equals, label = text.rpartition("=")
    if not equals or not pattern or not label:
        raise RecipeError(f"The override {text!r} is malformed. Expected 'REGEX=QUANTIZER', e.g. 'down_proj=nf4'.")
    return pattern, label
