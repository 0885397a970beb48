"""Parameters of a deployment, checked when it is made as its runs would check them: a wrong one costs no night."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.errors import DeployError
from pipeline.budget import Budget
from pipeline.errors import PipelineError, RecipeError
from registry import RegistryError

if TYPE_CHECKING:
    from prefect import Flow

    from pipeline.recipe import Recipe

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def check_parameters(deployment: str, flow: "Flow[..., Any]", parameters: dict[str, Any]) -> None:
    """Raise DeployError with what is wrong, and where: unknown or missing names, types, recipe, budgets, gates."""
    _check_names(deployment, flow, parameters)
    try:
        flow.validate_parameters(parameters)
    except Exception as error:  # pydantic's and Prefect's own
        raise DeployError(f"Deployment {deployment}: {' '.join(str(error).split())}.") from error
    try:
        recipes = _recipes(parameters)
        for name, check in _CHECKS.items():
            if parameters.get(name) is not None:
                check(parameters, recipes)
    except (PipelineError, RegistryError) as error:
        raise DeployError(f"Deployment {deployment}: {error}") from error


def check_apart(watches: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Raise DeployError where two of them make versions of one name by different recipes: each undoes the other's.

    Args:
        watches: names of deployments, each with parameters that its flow `watch` will be called with.
    """
    owners: dict[tuple[str, str], tuple[str, Recipe]] = {}
    for deployment, parameters in watches:
        for recipe in _recipes(parameters):
            several = len(parameters.get("budgets") or ()) > 1
            called = parameters.get("name") or Path(parameters["out"]).name
            name = f"{called}-{Budget.parse(recipe.budget).label}" if several else called
            place = (str(parameters.get("registry") or ""), name.lower())
            other, made_by = owners.setdefault(place, (deployment, recipe))
            if made_by != recipe:
                who = f"Deployments {other} and {deployment}" if other != deployment else f"Schedules of {deployment}"
                raise DeployError(
                    f"{who} both make versions of {name}, by different recipes, and "
                    "each would take back what the other made. Give one another name, or an `out` of another name."
                )


def _check_names(deployment: str, flow: "Flow[..., Any]", parameters: dict[str, Any]) -> None:
    import inspect

    known = inspect.signature(flow.fn).parameters
    unknown = [name for name in parameters if name not in known]
    missing = [name for name, each in known.items() if each.default is each.empty and name not in parameters]
    if unknown or missing:
        faults = [f"has no parameter {name}" for name in unknown] + [f"needs {name}" for name in missing]
        raise DeployError(
            f"Deployment {deployment}: the flow {flow.name} {', and '.join(faults)}. Its parameters are "
            f"{', '.join(known)}."
        )


def _recipes(parameters: dict[str, Any]) -> "list[Recipe]":
    """All recipes that a run would work with: one a budget. Raises RecipeError, BudgetError."""
    if "recipe" in parameters:
        given = [parameters["recipe"]]
    elif "recipes" in parameters:
        models, presets = parameters["models"], parameters["recipes"].values()
        given = [recipe | {"model": model} for recipe in presets for model in models]
    else:
        return []
    from pipeline.costs import choices_of
    from pipeline.recipe import Recipe, check_trainable

    budgets = parameters.get("budgets") or [None]
    recipes = [Recipe.of(**recipe | ({"budget": budget} if budget else {})) for recipe in given for budget in budgets]
    for recipe in recipes:
        check_trainable(recipe)
        choices_of(recipe.candidates, recipe.ranks, recipe.factor_bits)
    return recipes


def _check_budgets(parameters: dict[str, Any], recipes: "list[Recipe]") -> None:
    from pipeline.budget import parse_budgets

    if not parameters["budgets"]:
        raise RecipeError("budgets is an empty list. Leave it out for the recipe's own budget.")
    parse_budgets(",".join(parameters["budgets"]))


def _check_gates(parameters: dict[str, Any], recipes: "list[Recipe]") -> None:
    from flows.measured import check_measured_here
    from pipeline.errors import GateError
    from pipeline.gate import Requirement
    from pipeline.version_facts import SIZES

    for gate in parameters["gates"]:
        figure = Requirement.parse(gate).figure
        if figure not in SIZES and any(recipe.eval_windows == 0 for recipe in recipes):
            raise GateError(
                f"The gate {gate} asks for {figure}, and the recipe's evaluation measures nothing: eval_windows is 0. "
                f"Set it above 0, or ask for {' or '.join(SIZES)}."
            )
    for recipe in {recipe.model: recipe for recipe in recipes}.values():
        check_measured_here(parameters["gates"], recipe)


def _check_layout(parameters: dict[str, Any], recipes: "list[Recipe]") -> None:
    if not _REPO.fullmatch(parameters["repo"]):
        raise DeployError(f"{parameters['repo']!r} is no repository. Expected user/name.")
    if len(recipes) > 1 and parameters.get("layout") != "branches":
        raise DeployError(
            f"{len(recipes)} budgets are to be published at {parameters['repo']}, where each would take the place of "
            "the one before. Set layout to branches: a branch for each budget."
        )


def _check_alias(parameters: dict[str, Any], recipes: "list[Recipe]") -> None:
    from registry.alias import checked_alias

    checked_alias(parameters["alias"])


def _check_grace(parameters: dict[str, Any], recipes: "list[Recipe]") -> None:
    from pipeline.span import span_seconds

    span_seconds(parameters["grace"])


def _check_name(parameters: dict[str, Any], recipes: "list[Recipe]") -> None:
    from registry import checked_name

    if not str(parameters["out"]).strip():
        raise RecipeError("out is empty. Expected a folder.")
    if "recipe" in parameters:
        checked_name(parameters.get("name") or Path(parameters["out"]).name)


def _check_device(parameters: dict[str, Any], recipes: "list[Recipe]") -> None:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", parameters["device"]):
        raise RecipeError(f"{parameters['device']!r} is no device. Expected cpu, cuda or cuda:1.")


def _check_windows(parameters: dict[str, Any], recipes: "list[Recipe]") -> None:
    for name, least in (("num_windows", 1), ("seq_len", 2)):
        if parameters.get(name, least) < least:
            raise RecipeError(f"{name} is {parameters[name]}. Expected {least} or more.")


def _check_version(parameters: dict[str, Any], recipes: "list[Recipe]") -> None:
    from registry import VersionReference

    VersionReference.parse(parameters["version"])


def _check_pairs(parameters: dict[str, Any], recipes: "list[Recipe]") -> None:
    from flows.sweep import pairs

    if not recipes:
        raise RecipeError("There is nothing to do: models or recipes are empty.")
    pairs.fn(parameters["models"], parameters["recipes"], parameters["out"])


def _check_runner(parameters: dict[str, Any], recipes: "list[Recipe]") -> None:
    from flows.runner import Runner

    Runner.parse(parameters["runner"])


_CHECKS: dict[str, Callable[[dict[str, Any], "list[Recipe]"], None]] = {
    "budgets": _check_budgets,
    "gates": _check_gates,
    "repo": _check_layout,
    "alias": _check_alias,
    "grace": _check_grace,
    "out": _check_name,
    "runner": _check_runner,
    "device": _check_device,
    "num_windows": _check_windows,
    "seq_len": _check_windows,
    "version": _check_version,
    "models": _check_pairs,
}
