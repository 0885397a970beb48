"""The flow `sweep`: every recipe on every model; one that fails does not stop the others."""

from collections.abc import Callable
from typing import Any

from prefect import flow, tags, task
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run
from prefect.states import State

from flows.compress import compress
from flows.job import Outcome
from flows.notify import WATCHED
from flows.states import failed
from flows.steps import PLAIN
from flows.version import check_version, tags_within
from pipeline.errors import RecipeError
from pipeline.origin import model_name


def run_name() -> str:
    """`2 models x 3 recipes at 2.5bpw, 3bpw`"""
    asked = flow_run.parameters
    return f"{len(asked['models'])} models x {len(asked['recipes'])} recipes at {', '.join(asked['budgets'])}"


@flow(name="sweep", flow_run_name=run_name, **WATCHED)
def sweep(
    models: list[str],
    recipes: dict[str, dict[str, Any]],
    budgets: list[str],
    out: str,
    registry: str | None = None,
    device: str = "cpu",
    runner: str = "threads",
) -> list[str] | State[Any]:
    """Compress each model with each recipe to all budgets.

    Args:
        models: folders, Hub ids, GGUF files, or `demo`.
        recipes: name -> fields of pipeline.recipe.Recipe but the model and the budget, and `preset` if wanted.
        out: gets a folder MODEL-RECIPE for each pair, which is also what the versions are called.
        registry, device, runner: as of `compress`.
    Returns:
        The versions; where a pair failed, the state Failed that names it, after all others were tried.
    """
    check_version()
    with tags(*tags_within()):
        found = {
            pair["name"]: attempted(
                compress, pair["recipe"], pair["out"], budgets, pair["name"], registry, device, runner
            )
            for pair in pairs(models, recipes, out)
        }
    rows = [row for name, result in found.items() for row in rows_of(name, result)]
    create_table_artifact(rows, key="bitsmith-sweep", description=f"{len(found)} pairs of a model and a recipe")
    failures = [f"{name}: {result}" for name, result in found.items() if isinstance(result, Exception)]
    return failed(failures, len(found)) if failures else [row["version"] for row in rows]


def attempted(run: Callable[..., list[Outcome]], *arguments: Any) -> list[Outcome] | Exception:
    """What a flow returns or raises.

    Not by way of its state: that is the server's answer, which has no result in it where an answer before was lost.
    """
    try:
        return run(*arguments)
    except Exception as error:
        return error


@task(**PLAIN)
def pairs(models: list[str], recipes: dict[str, dict[str, Any]], out: str) -> list[dict[str, Any]]:
    """Each model with each recipe: what `compress` is to be given."""
    if own := [called for called, recipe in recipes.items() if "model" in recipe]:
        raise RecipeError(f"The recipe {own[0]} names a model, and a sweep has models of its own. Leave it out there.")
    found = [
        {"recipe": recipe | {"model": model}, "out": f"{out}/{name}", "name": name}
        for model in models
        for called, recipe in recipes.items()
        for name in [f"{model_name(model.rstrip('/'), None)}-{called}"]
    ]
    names = [str(pair["name"]) for pair in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(
            f"Several of the models would be called {', '.join(twice)}. Expected models whose last parts differ; sweep "
            "the others apart."
        )
    return found


def rows_of(name: str, result: list[Outcome] | Exception) -> list[dict[str, str]]:
    """A version a line, or the failure."""
    if isinstance(result, Exception):
        return [{"pair": name, "state": "Failed", "version": "", "seconds": "", "what": str(result)}]
    return [
        {
            "pair": name,
            "state": "Completed",
            "version": outcome["version"],
            "seconds": f"{sum(stage['seconds'] for stage in outcome['stages']):.1f}",
            "what": outcome["job"]["out"],
        }
        for outcome in result
    ]
