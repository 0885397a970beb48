"""The plan alone: what every matrix would get, and the exact size of the folder that would follow."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.allocation import Plan
from pipeline.checkpoint import Checkpoint
from pipeline.forecast import StageForecast, forecast
from pipeline.memory_check import check_memory
from pipeline.model import Model
from pipeline.progress import SILENT, Progress
from pipeline.recipe import Recipe
from pipeline.sweep import largest_run, prepare_runs
from registry import Registry


@dataclass(frozen=True)
class Planned:
    """A plan and its forecast.

    Attributes:
        files_bytes: the exact size of every file of the folder.
        stages: what `compress` will take, of the largest of several budgets.
    """

    model: Model
    plan: Plan
    files_bytes: dict[str, int]
    stages: tuple[StageForecast, ...]

    @property
    def size_bytes(self) -> int:
        """Of the whole folder."""
        return sum(self.files_bytes.values())

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "plan": self.plan.to_json(),
            "files_bytes": self.files_bytes,
            "size_bytes": self.size_bytes,
            "stages": [asdict(stage) for stage in self.stages],
        }


def make_plan(
    recipe: Recipe, root: Path, *, device: str = "cpu", dry_run: bool = False, progress: Progress = SILENT
) -> Planned:
    """`make_plans` for one budget."""
    return make_plans([recipe], root, device=device, dry_run=dry_run, progress=progress)[0]


def make_plans(
    recipes: Sequence[Recipe],
    root: Path,
    *,
    device: str = "cpu",
    dry_run: bool = False,
    progress: Progress = SILENT,
    on_start: Callable[[Sequence[StageForecast]], None] = lambda stages: None,
) -> list[Planned]:
    """Measure what is not yet measured, once, and solve for each recipe's budget.

    Args:
        recipes: equal but for the budget.
        root: the registry's folder. Statistics and costs found there are used.
        dry_run: leave nothing there; what must be measured goes to a temporary folder.
        on_start: called with what the stages of `compress` will take, before anything is measured.
    Raises:
        PipelineError: see pipeline/errors.py.
    """
    with tempfile.TemporaryDirectory() as scratch:
        start = Path(scratch) if dry_run and not (root / "blobs").exists() else root
        registry = Registry(start, read_only=dry_run and start == root)
        runs = prepare_runs(recipes, registry, device=device, resume=True, progress=progress)
        first, stages = runs[0], forecast(largest_run(runs))
        on_start(stages)
        measuring = tuple(stage for stage in stages if stage.name in ("statistics", "costs", "embeddings"))
        check_memory(largest_run(runs), measuring)
        elsewhere = Registry(Path(scratch)) if dry_run and start == root else None
        costs = first.found_costs()  # of which statistics, that may be large, need not be read again
        if costs is None:
            first.model.check_finite(progress)
            first = replace(first, registry=elsewhere or registry)
            costs = first.costs(first.statistics())
        plans = [replace(run, registry=first.registry).allocate(costs, elsewhere) for run in runs]
    return [
        Planned(run.model, plan, Checkpoint(run.model, plan, run.facts).sizes_bytes, stages)
        for run, plan in zip(runs, plans, strict=True)
    ]
