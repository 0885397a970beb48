"""The flow `compress`: one model, one budget, every step a task to watch.

    python -m flows.compress MODEL --budget 3.0bpw -o OUT      several budgets: flows/compress_budgets.py

The same steps, the same registry and the same bytes as `bitsmith compress`: either goes on from the other.
"""

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from flows import steps
from flows.job import Done, Job, Outcome
from pipeline.home import home


def run_name() -> str:
    """`SmolLM2-135M-Instruct at 3.0bpw`"""
    recipe = flow_run.parameters["recipe"]
    return f"{Path(str(recipe.get('model'))).name} at {recipe.get('budget')}"


@flow(name="compress", flow_run_name=run_name, persist_result=False)
def compress(
    recipe: dict[str, Any],
    out: str,
    name: str | None = None,
    registry: str | None = None,
    device: str = "cpu",
    resume: bool = True,
) -> Outcome:
    """Compress a model into a folder and publish it.

    Args:
        recipe: fields of pipeline.recipe.Recipe, and `preset` if wanted.
        out: folder to write.
        name: in the registry; the folder's by default.
        registry: folder of the registry; the user's own by default.
        resume: go on from an unfinished run of the same recipe; False starts over.
    Raises:
        PipelineError, RegistryError: the run is then Failed, with that message.
    """
    job = steps.prepare(recipe, registry or str(home() / "registry"), out, name or Path(out).name, device, resume)
    statistics = steps.collect_statistics(job)
    costs = steps.measure_costs(job, statistics)
    return complete(job, statistics, costs, [statistics, costs])


def complete(job: Job, statistics: Done, costs: Done, before: list[Done]) -> Outcome:
    """From the cost table to the published version; `before` are the stages that the summary starts with."""
    plan = steps.allocate(job, costs, statistics)
    matrices = steps.decompose(job, plan, statistics)
    before = [*before, plan, matrices]
    if job["recipe"]["recover"]:
        matrices = steps.recover(job, plan, matrices, statistics)
        before.append(matrices)
    checkpoint = steps.write_checkpoint(job, plan, matrices)
    evaluation = steps.evaluate(job, checkpoint)
    report = steps.write_report(job, costs, plan, matrices, checkpoint, evaluation)
    version = steps.publish(job, checkpoint, report)
    return steps.summarize(job, version, [*before, checkpoint, evaluation, report])


if __name__ == "__main__":
    from flows.command import main

    main()
