"""The plan alone: what every matrix would get, and the exact size of the folder that would follow."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.allocation import Plan
from pipeline.checkpoint import Checkpoint
from pipeline.model import Model
from pipeline.progress import SILENT, Progress
from pipeline.recipe import Recipe
from pipeline.run import Run
from pipeline.stages import StageLog
from registry import Registry


@dataclass(frozen=True)
class Planned:
    """A plan and its forecast: `files_bytes` is the exact size of every file of the folder."""

    model: Model
    plan: Plan
    files_bytes: dict[str, int]

    @property
    def size_bytes(self) -> int:
        """Of the whole folder."""
        return sum(self.files_bytes.values())


def make_plan(
    recipe: Recipe, root: Path, *, device: str = "cpu", dry_run: bool = False, progress: Progress = SILENT
) -> Planned:
    """Measure what is not yet measured and solve.

    Args:
        root: the registry's folder. Statistics and costs found there are used.
        dry_run: leave nothing there; what must be measured goes to a temporary folder.
    Raises:
        PipelineError: see pipeline/errors.py.
    """
    with tempfile.TemporaryDirectory() as scratch:
        start = Path(scratch) if dry_run and not root.exists() else root
        run = Run.prepare(recipe, Registry(start), device=device, resume=True, log=StageLog(), progress=progress)
        if dry_run and start == root and not run.has_costs():
            run = replace(run, registry=Registry(Path(scratch)))
        plan = run.allocate(run.costs(run.statistics()))
    return Planned(run.model, plan, Checkpoint(run.model, plan, run.facts).sizes_bytes)
