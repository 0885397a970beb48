"""What each stage of a job does, in whatever process it runs: by their names, for they are sent there."""

from pathlib import Path
from typing import TYPE_CHECKING

from flows.job import Done, Job, artifact, artifact_if_any, output_folder
from registry import Artifact

if TYPE_CHECKING:
    from pipeline.run import Run


def statistics(run: "Run", job: Job) -> Artifact | None:
    """The metric of every matrix; None if the recipe wants none."""
    return run.statistics()


def costs(run: "Run", job: Job, statistics: Done) -> Artifact:
    """The cost table."""
    return run.costs(artifact_if_any(run, statistics))


def embeddings(run: "Run", job: Job) -> Artifact | None:
    """What each way to pack embeddings and head costs; None where there is no choice."""
    return run.embedding_costs()


def plan(run: "Run", job: Job, costs: Done, statistics: Done) -> Artifact:
    """The integer program's answer, compared with its rival where there is one."""
    return run.plan(artifact(run, costs), artifact_if_any(run, statistics))


def matrices(run: "Run", job: Job, plan: Done, statistics: Done) -> Artifact:
    """Every matrix quantized as planned."""
    return run.matrices(artifact(run, plan), artifact_if_any(run, statistics))


def recovered(run: "Run", job: Job, plan: Done, matrices: Done, statistics: Done) -> Artifact:
    """The matrices after training."""
    return run.recovered(artifact(run, plan), artifact(run, matrices), artifact_if_any(run, statistics))


def checkpoint(run: "Run", job: Job, plan: Done, matrices: Done) -> Artifact:
    """The checkpoint, audited and in its folder."""
    planned, quantized = artifact(run, plan), artifact(run, matrices)
    made = run.checkpoint(planned, quantized)
    run.deliver(made, planned, quantized, output_folder(run, job))
    return made


def evaluation(run: "Run", job: Job, checkpoint: Done) -> Artifact | None:
    """Quality beside the original; None if the recipe asks for none."""
    return run.evaluation(artifact(run, checkpoint), Path(job["out"]))


def report(
    run: "Run", job: Job, costs: Done, plan: Done, matrices: Done, checkpoint: Done, evaluation: Done
) -> Artifact:
    """The HTML report, in the registry and in the folder."""
    made = run.report(
        artifact(run, costs),
        artifact(run, plan),
        artifact(run, matrices),
        artifact(run, checkpoint),
        artifact_if_any(run, evaluation),
    )
    output_folder(run, job).add_report(run.registry, made)
    return made
