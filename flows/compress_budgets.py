"""The flow `compress-budgets`: one model, several budgets, one measurement.

    python -m flows.compress MODEL --budget 2.5bpw,3bpw -o OUT

The same folders, versions and bytes as `bitsmith compress` with that list.
"""

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from flows import steps
from flows.compress import complete
from flows.job import Outcome
from pipeline.home import home
from pipeline.sweep import named_failure


def run_name() -> str:
    """`SmolLM2-135M-Instruct at 2.5bpw, 3bpw`"""
    recipes = flow_run.parameters["recipes"]
    return f"{Path(str(recipes[0].get('model'))).name} at {', '.join(str(recipe.get('budget')) for recipe in recipes)}"


@flow(name="compress-budgets", flow_run_name=run_name, persist_result=False)
def compress_budgets(
    recipes: list[dict[str, Any]],
    out: str,
    name: str | None = None,
    registry: str | None = None,
    device: str = "cpu",
    resume: bool = True,
) -> list[Outcome]:
    """Compress a model to several budgets, publish each result, and compare them.

    Args:
        recipes: fields of pipeline.recipe.Recipe, equal but for the budget.
        out: folder to write; a folder a budget below it.
        name: start of the names in the registry; the folder's name by default.
        registry: folder of the registry; the user's own by default.
        resume: go on from an unfinished run; False starts over.
    Raises:
        PipelineError, RegistryError: the run is then Failed, with that message.
    """
    jobs = steps.prepare_budgets(
        recipes, registry or str(home() / "registry"), out, name or Path(out).name, device, resume
    )
    statistics = steps.collect_statistics(jobs[0])
    costs = steps.measure_costs(jobs[0], statistics)
    outcomes: list[Outcome] = []
    for job in jobs:
        with named_failure(job["recipe"]["budget"], len(outcomes), len(jobs)):
            outcomes.append(complete(job, statistics, costs, [] if outcomes else [statistics, costs]))
    steps.compare_budgets(out)
    return outcomes
