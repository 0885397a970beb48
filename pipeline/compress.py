"""compress(): the whole story.

Each stage is a step of the registry: its result is found where the same work was done before, its finished
parts survive a kill, and its parents are the version's lineage.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.allocation import Plan, free_to_choose
from pipeline.disk_space import check_disk, disk_may_fill
from pipeline.eval_report import EvalReport
from pipeline.memory_check import check_memory
from pipeline.output import OutputFolder
from pipeline.progress import SILENT, Progress
from pipeline.recipe import Recipe
from pipeline.recovery_report import RecoveryReport
from pipeline.run import Run
from pipeline.stages import Stage, StageLog
from registry import Artifact, Registry, Version


@dataclass(frozen=True)
class Compressed:
    """What a run made.

    Attributes:
        folder: the checkpoint.
        version: where it stands in the registry.
        plan: what every matrix got.
        evaluation: None if the recipe asks for none.
        recovery: likewise.
        stages: seconds and peak memory.
        size_bytes: of the checkpoint's files.
        original_bytes: of the same files of the original.
        was_finished: the folder was there, and nothing was left to do.
    """

    folder: Path
    version: Version
    plan: Plan
    evaluation: EvalReport | None
    recovery: RecoveryReport | None
    stages: tuple[Stage, ...]
    size_bytes: int
    original_bytes: int
    was_finished: bool

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "folder": str(self.folder),
            "name": self.version.name,
            "version": self.version.number,
            "digest": self.version.digest,
            "bits_per_param": self.plan.bits_per_param,
            "size_bytes": self.size_bytes,
            "original_bytes": self.original_bytes,
            "embeddings": {module: each.label for module, each in self.plan.embeddings.items()},
            "predicted_cost": self.plan.predicted_cost,
            "expected_cost": self.plan.expected_cost,
            "gap": self.plan.gap,
            "evaluation": self.evaluation.to_json() if self.evaluation else None,
            "recovery": self.recovery.to_json() if self.recovery else None,
            "stages": [asdict(stage) for stage in self.stages],
            "was_finished": self.was_finished,
        }


def compress(
    recipe: Recipe,
    registry: Registry,
    out: Path,
    *,
    name: str | None = None,
    device: str = "cpu",
    resume: bool = True,
    progress: Progress = SILENT,
    on_start: Callable[[Run], None] = lambda run: None,
) -> Compressed:
    """Compress a model into `out` and publish it in `registry` under `name` (default: the folder's name).

    Args:
        resume: go on from an earlier, unfinished run of the same recipe; False starts over.
        on_start: called once everything is checked and before long work begins.
    Raises:
        PipelineError: see pipeline/errors.py.
        RegistryError: the registry cannot be read or written.
    """
    name = registry.checked_name(name or out.name)
    log = StageLog()
    with log.stage("open"):
        run = Run.prepare(recipe, registry, device=device, resume=resume, log=log, progress=progress)
        output = OutputFolder(out, run.facts)
        if not output.is_finished():
            check_disk([run], out)
            log.forecasts = check_memory(run)
            run.model.check_finite(progress)
        with disk_may_fill(run, out.parent):
            output.claim(resume=resume)
        was_finished = output.is_finished() and output.is_reported()
    on_start(run)
    statistics, costs = measure(run)
    return complete(run, output, name, statistics, costs, was_finished=was_finished)


def measure(run: Run) -> tuple[Artifact | None, Artifact]:
    """Statistics, cost table, and what packed embeddings cost: the part that does not depend on the budget."""
    with run.log.stage("statistics"):
        statistics = run.statistics()
    with run.log.stage("costs"):
        costs = run.costs(statistics)
    measure_embeddings(run)
    return statistics, costs


def measure_embeddings(run: Run) -> None:
    """The last of it, where the program chooses how they are packed."""
    if free_to_choose(run.embeddings):
        with run.log.stage("embeddings"):
            run.embedding_costs()


def complete(
    run: Run,
    output: OutputFolder,
    name: str,
    statistics: Artifact | None,
    costs: Artifact,
    *,
    was_finished: bool,
) -> Compressed:
    """From the cost table to the published version: the part that every budget needs for itself."""
    log, registry = run.log, run.registry
    with log.stage("plan"):
        plan = run.plan(costs, statistics)
    with log.stage("decompose"):
        matrices = run.matrices(plan, statistics)
    if run.recipe.recover:
        with log.stage("recover"):
            matrices = run.recovered(plan, matrices, statistics)
    with log.stage("checkpoint"):
        checkpoint = run.checkpoint(plan, matrices)
        run.deliver(checkpoint, plan, matrices, output)
    with log.stage("evaluate"):
        evaluation = run.evaluation(checkpoint, output.path)
    with log.stage("report"):
        report = run.report(costs, plan, matrices, checkpoint, evaluation)
        with disk_may_fill(run, output.path.parent):
            output.add_report(registry, report)
            version = registry.publish(name, checkpoint, report)
    return Compressed(
        folder=output.path,
        version=version,
        plan=run.results.plan(plan),
        evaluation=run.results.eval_report(evaluation),
        recovery=run.results.recovery(matrices),
        stages=tuple(log.stages),
        size_bytes=checkpoint.size_bytes,
        original_bytes=run.model.folder_bytes,
        was_finished=was_finished,
    )
