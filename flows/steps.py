"""The steps of a compression as Prefect tasks: plain JSON in, plain JSON out.

The registry's steps decide what is done again, so Prefect caches and stores nothing. Of these tasks only the one that
opens model and texts is tried again, after a network's failure; batches on workers are too, see flows/spread.py.
"""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from flows import work
from flows.failures import keep_known_errors_short, only_network_failures
from flows.job import Done, Job, Outcome, out_folder, prepare_job, prepare_jobs, read_outcome, registry_folder
from flows.progress import RunProgress
from flows.stage import do
from flows.summary import artifact_key, show_beside_last, summary
from registry import Registry

keep_known_errors_short()

PLAIN: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}
OPENING: dict[str, Any] = PLAIN | {
    "retries": 2,  # a Hub that is away fails a run within two minutes
    "retry_delay_seconds": exponential_backoff(10),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": only_network_failures,
}


@task(**OPENING)
def prepare(
    recipe: dict[str, Any],
    budgets: list[str] | None,
    registry: str | None,
    out: str,
    name: str | None,
    device: str,
    runner: str,
    resume: bool,
) -> list[Job]:
    """Open the model, tokenize the texts, claim the output folders; find out now what cannot work later.

    A job for each budget: all of them, or none.
    """
    recipes = [recipe | {"budget": budget} for budget in budgets] if budgets else [recipe]
    place, called = str(registry_folder(registry)), name or Path(out).name
    if len(recipes) == 1:
        return [prepare_job(recipes[0], place, out, called, device, runner, resume)]
    return prepare_jobs(recipes, place, out, called, device, runner, resume)


@task(**PLAIN)
def collect_statistics(job: Job) -> Done:
    """The metric of every matrix."""
    return do(job, "statistics", work.statistics, spread="windows")


@task(**PLAIN)
def measure_costs(job: Job, statistics: Done) -> Done:
    """The cost table: matrices x choices."""
    return do(job, "costs", work.costs, statistics, spread="matrices")


@task(**PLAIN)
def measure_embeddings(job: Job) -> Done:
    """What each way to pack embeddings and head costs, where the program chooses."""
    return do(job, "embeddings", work.embeddings)


@task(**PLAIN)
def allocate(job: Job, costs: Done, statistics: Done) -> Done:
    """The integer program's plan."""
    return do(job, "plan", work.plan, costs, statistics)


@task(**PLAIN)
def decompose(job: Job, plan: Done, statistics: Done) -> Done:
    """Every matrix quantized as planned."""
    return do(job, "decompose", work.matrices, plan, statistics, spread="matrices")


@task(**PLAIN)
def recover(job: Job, plan: Done, matrices: Done, statistics: Done) -> Done:
    """The matrices after training, in the place of those before."""
    return do(job, "recover", work.recovered, plan, matrices, statistics)


@task(**PLAIN)
def write_checkpoint(job: Job, plan: Done, matrices: Done) -> Done:
    """The finished folder, in its place once a fresh process has audited it."""
    return do(job, "checkpoint", work.checkpoint, plan, matrices)


@task(**PLAIN)
def evaluate(job: Job, checkpoint: Done) -> Done:
    """Quality beside the original."""
    return do(job, "evaluate", work.evaluation, checkpoint)


@task(**PLAIN)
def write_report(job: Job, costs: Done, plan: Done, matrices: Done, checkpoint: Done, evaluation: Done) -> Done:
    """The HTML report, in the registry and in the folder."""
    return do(job, "report", work.report, costs, plan, matrices, checkpoint, evaluation)


@task(**PLAIN)
def publish(job: Job, checkpoint: Done, report: Done) -> str:
    """The next version of the job's name in the registry: "name:1"."""
    registry = Registry(Path(job["registry"]))
    made, described = (registry.get(str(done["digest"])) for done in (checkpoint, report))
    return str(registry.publish(job["name"], made, described))


@task(**PLAIN)
def compare_budgets(out: str) -> None:
    """The page, the picture and the figures of all checkpoints below `out`."""
    from pipeline.pareto import write_pareto

    write_pareto(out_folder(out), progress=RunProgress())


@task(**PLAIN)
def summarize(job: Job, version: str, stages: list[Done]) -> Outcome:
    """The run's figures, for the caller and as a page beside the run."""
    outcome = Outcome(job=job, version=version, stages=[job["opened"], *stages])
    key = artifact_key(job["name"])
    create_markdown_artifact(summary(read_outcome(outcome)), key=key, description=version)
    report = (Path(job["out"]) / "report" / "index.html").resolve()
    create_link_artifact(report.as_uri(), key=f"{key}-report", description=f"The report of {version}, on this disk")
    show_beside_last(Registry(Path(job["registry"])), version)
    return outcome
