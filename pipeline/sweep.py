"""compress_budgets(): one checkpoint a budget, all from one measurement.

    OUT/2.5bpw/  OUT/3bpw/  ...            finished checkpoints (output.py), published as NAME-2.5bpw ...
    OUT/pareto.json  pareto.png  index.html   all of them side by side (pareto.py)

Model and texts are opened once, statistics and cost table measured once. Whatever can be refused is refused
for all budgets before the first long stage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.allocation import free_to_choose
from pipeline.budget import Budget
from pipeline.compress import Compressed, complete, measure, measure_embeddings
from pipeline.disk_space import check_disk, disk_may_fill
from pipeline.errors import BudgetError, RecipeError
from pipeline.memory_check import check_memory
from pipeline.named_failure import named_failure
from pipeline.output import OutputFolder
from pipeline.pareto import write_pareto
from pipeline.progress import SILENT, Progress
from pipeline.recipe import Recipe
from pipeline.run import Run
from pipeline.stages import StageLog
from pipeline.sweep_folder import check_same_recipe, check_sweep_folder
from registry import Registry


@dataclass(frozen=True)
class Sweep:
    """What several budgets made of one model.

    Attributes:
        folder: of the comparison, with one checkpoint folder a budget inside.
        results: in the order of the budgets asked for.
    """

    folder: Path
    results: tuple[Compressed, ...]

    @property
    def was_finished(self) -> bool:
        """Every checkpoint was there, and nothing was left to do."""
        return all(done.was_finished for done in self.results)

    def to_json(self) -> list[dict[str, Any]]:
        """For machines: one object a budget."""
        return [done.to_json() for done in self.results]


@dataclass(frozen=True)
class Part:
    """One budget of a sweep: its run, its folder, its name in the registry."""

    run: Run
    output: OutputFolder
    name: str

    @property
    def is_finished(self) -> bool:
        """Are checkpoint and report in their places?"""
        return self.output.is_finished() and self.output.is_reported()


def compress_budgets(
    recipes: Sequence[Recipe],
    registry: Registry,
    out: Path,
    *,
    name: str | None = None,
    device: str = "cpu",
    resume: bool = True,
    progress: Progress = SILENT,
    on_start: Callable[[list[Part]], None] = lambda parts: None,
) -> Sweep:
    """Compress a model to each recipe's budget, into a folder a budget below `out`, and compare the results.

    Args:
        recipes: equal but for the budget.
        name: the versions are called `name`-2.5bpw and so on; by default the name of `out`.
        resume: go on from an earlier, unfinished run; False starts over.
        on_start: called once everything is checked and before long work begins.
    Raises:
        BudgetError: names every budget that nothing fits.
        PipelineError: see pipeline/errors.py. Of a failure under way, the message names the budget.
        RegistryError: the registry cannot be read or written.
    """

    def forecast(runs: list[Run]) -> None:
        forecasts = check_memory(largest_run(runs))
        for run in runs:
            run.log.forecasts = forecasts

    parts = prepare_parts(
        recipes, registry, out, name=name, device=device, resume=resume, before_claim=forecast, progress=progress
    )
    were_finished = [part.is_finished for part in parts]
    on_start(parts)
    statistics, costs = measure(parts[0].run)
    if not free_to_choose(parts[0].run.embeddings):  # but those of another kind of budget may be
        measure_embeddings(replace(largest_run([part.run for part in parts]), log=parts[0].run.log))
    results: list[Compressed] = []
    for part, was_finished in zip(parts, were_finished, strict=True):
        progress.say(f"Budget {part.run.recipe.budget}, {len(results) + 1} of {len(parts)}")
        with named_failure(part.run.recipe.budget, len(results), len(parts)):
            done = complete(part.run, part.output, part.name, statistics, costs, was_finished=was_finished)
        results.append(done)
    write_pareto(out, progress=progress)
    return Sweep(out, tuple(results))


def prepare_parts(
    recipes: Sequence[Recipe],
    registry: Registry,
    out: Path,
    *,
    name: str | None,
    device: str,
    resume: bool,
    progress: Progress,
    before_claim: Callable[[list[Run]], None] = lambda runs: None,
) -> list[Part]:
    """Check everything for all budgets, then take possession of their folders.

    Args:
        before_claim: what else is to be checked, where it may be.

    The first part's log has the time of opening.

    Raises:
        PipelineError, RegistryError: see `compress_budgets`; nothing is written then.
    """
    check_sweep_folder(out)
    labels = [Budget.parse(recipe.budget).label for recipe in recipes]
    names = [registry.checked_name(f"{name or out.name}-{label}") for label in labels]
    log = StageLog()
    with log.stage("open"):
        runs = prepare_runs(recipes, registry, device=device, resume=resume, progress=progress)
        runs[0] = replace(runs[0], log=log)
        outputs = [OutputFolder(out / label, run.facts) for label, run in zip(labels, runs, strict=True)]
        check_disk([run for run, output in zip(runs, outputs, strict=True) if not output.is_finished()], out)
        before_claim(runs)
        if not all(output.is_finished() for output in outputs):
            runs[0].model.check_finite(progress)
        check_same_recipe(out, runs[0].facts)
        for output in outputs:
            output.check_claim(resume=resume)
        with disk_may_fill(runs[0], out):
            for output in outputs:
                output.claim(resume=resume)
    return [Part(run, output, name) for run, output, name in zip(runs, outputs, names, strict=True)]


def prepare_runs(
    recipes: Sequence[Recipe], registry: Registry, *, device: str, resume: bool, progress: Progress
) -> list[Run]:
    """`Run.prepare` for recipes that differ in the budget alone: the model is opened once.

    Raises:
        RecipeError: the recipes differ in more.
        BudgetError: names every budget that nothing fits, and what would.
        PipelineError: as `Run.prepare`.
    """
    if len({recipe.model_copy(update={"budget": ""}) for recipe in recipes}) != 1:
        raise RecipeError("Several budgets make one comparison only where their recipes are equal in all else.")
    first = Run.open(recipes[0], registry, device=device, resume=resume, log=StageLog(), progress=progress)
    runs = [replace(first, recipe=recipe, log=StageLog()) for recipe in recipes]
    _check_budgets(runs)
    return runs


def largest_run(runs: Sequence[Run]) -> Run:
    """Of runs that differ in the budget, the one that does and takes most: what embeddings cost is measured, or not."""
    return max(runs, key=lambda run: (bool(free_to_choose(run.embeddings)), run.sizes.compressed_bytes))


def _check_budgets(runs: list[Run]) -> None:
    faults = []
    for run in runs:
        try:
            run.smallest_plan()
        except BudgetError as error:
            faults.append(error)
    if len(runs) == 1 and faults:
        raise faults[0]
    if faults:
        raise BudgetError(
            f"{len(faults)} of the {len(runs)} budgets cannot be met, and nothing was started. "
            + " ".join(map(str, faults))
        )
