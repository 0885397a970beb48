"""The flow `compress`: one model, one budget or several, every step a task to watch.

    python -m flows.compress MODEL --budget 3.0bpw -o OUT
    python -m flows.compress MODEL --budget 2.5bpw,3bpw -o OUT

The same steps, the same registry and the same bytes as `bitsmith compress`: either goes on from the other.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from prefect import flow
from prefect.runtime import flow_run

from flows import steps
from flows.cluster import end_workers, kept_workers
from flows.job import Done, Job, Outcome
from flows.notify import WATCHED
from flows.slots import alone_with
from flows.version import check_version
from pipeline.named_failure import named_failure

if TYPE_CHECKING:
    from prefect import Task

P = ParamSpec("P")
T = TypeVar("T")


def run_name() -> str:
    """`SmolLM2-135M-Instruct at 2.5bpw, 3bpw`"""
    recipe, budgets = flow_run.parameters["recipe"], flow_run.parameters.get("budgets")
    return f"{Path(str(recipe.get('model'))).name} at {', '.join(budgets or [str(recipe.get('budget'))])}"


@flow(name="compress", flow_run_name=run_name, **WATCHED)
def compress(
    recipe: dict[str, Any],
    out: str,
    budgets: list[str] | None = None,
    name: str | None = None,
    registry: str | None = None,
    device: str = "cpu",
    runner: str = "threads",
    resume: bool = True,
) -> list[Outcome]:
    """Compress a model into a folder and publish it in the registry; to several budgets from one measurement.

    Args:
        recipe: fields of pipeline.recipe.Recipe, and `preset` if wanted.
        out: folder to write; with several budgets, a folder for each below it, and a page that compares them.
        budgets: in the place of the recipe's.
        name: in the registry, the folder's by default; with several budgets, followed by the budget.
        registry: folder of the registry; the user's own by default.
        runner: where matrices are measured and decomposed, see flows/runner.py.
        resume: go on from an unfinished run of the same recipe; False starts over.
    Returns:
        One outcome for each budget.
    Raises:
        PipelineError, RegistryError: the run is then Failed, with that message.
    """
    check_version()
    with alone_with(str(recipe.get("model")), device), kept_workers():
        jobs = _named(steps.prepare)(recipe, budgets, registry, out, name, device, runner, resume)
        statistics = _named(steps.collect_statistics)(jobs[0])
        costs = _named(steps.measure_costs)(jobs[0], statistics)
        choosing = [job for job in jobs if job["embeddings_are_free"]][:1]
        if choosing:
            end_workers()  # the original is loaded beside them
        shared = [statistics, costs, *(_named(steps.measure_embeddings)(job) for job in choosing)]
        if len(jobs) == 1:
            return [complete(jobs[0], statistics, costs, shared)]
        outcomes: list[Outcome] = []
        for job in jobs:
            with named_failure(job["recipe"]["budget"], len(outcomes), len(jobs)):
                outcomes.append(complete(job, statistics, costs, [] if outcomes else shared))
        _named(steps.compare_budgets)(out)
        return outcomes


def complete(job: Job, statistics: Done, costs: Done, before: list[Done]) -> Outcome:
    """From the cost table to the published version; `before` are the stages that the summary starts with."""
    budget = job["recipe"]["budget"]
    plan = _named(steps.allocate, budget)(job, costs, statistics)
    matrices = _named(steps.decompose, budget)(job, plan, statistics)
    end_workers()
    before = [*before, plan, matrices]
    if job["recipe"]["recover"]:
        matrices = _named(steps.recover, budget)(job, plan, matrices, statistics)
        before.append(matrices)
    checkpoint = _named(steps.write_checkpoint, budget)(job, plan, matrices)
    evaluation = _named(steps.evaluate, budget)(job, checkpoint)
    report = _named(steps.write_report, budget)(job, costs, plan, matrices, checkpoint, evaluation)
    version = _named(steps.publish, budget)(job, checkpoint, report)
    return _named(steps.summarize, budget)(job, version, [*before, checkpoint, evaluation, report])


def _named(step: "Task[P, T]", budget: str | None = None) -> "Task[P, T]":
    """As people read it: `measure costs`, and `write checkpoint at 3bpw` for what each budget needs once."""
    name = step.name.replace("_", " ")
    return step.with_options(task_run_name=f"{name} at {budget}" if budget else name)


if __name__ == "__main__":
    from flows.command import main

    main()
