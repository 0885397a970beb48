"""What the command line shows of several budgets: one table before the work, one after it."""

from typing import TYPE_CHECKING

from pipeline.budget import human_bytes
from pipeline.disk_space import checkpoint_disk_bytes, shared_disk_bytes
from pipeline.display import ERRORS, RESULTS, add_run_rows, new_table, show_forecast, smallest_plan

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipeline.planning import Planned
    from pipeline.sweep import Part, Sweep


def show_sweep_start(parts: "Sequence[Part]", out: "Path") -> None:
    """What a run is about to do for every budget together, and for each."""
    from pipeline.sweep import largest_run

    run = largest_run([part.run for part in parts])
    table = new_table(title=f"Plan of the run, {len(parts)} budgets")
    table.add_row("smallest plan", smallest_plan(run))
    add_run_rows(table, run)
    disk_bytes = shared_disk_bytes(run) + sum(checkpoint_disk_bytes(part.run) for part in parts)
    table.add_row("disk", f"up to {human_bytes(disk_bytes)} for results and intermediate files")
    table.add_row("output", f"{out}, a folder a budget")
    ERRORS.print(table)
    each = new_table("budget", "matrices, at most", "version", "to do", title="Each budget")
    for part in parts:
        each.add_row(part.run.recipe.budget, human_bytes(part.run.sizes.compressed_bytes), part.name, _to_do(part))
    ERRORS.print(each)
    show_forecast(parts[0].run.log.forecasts)
    ERRORS.print(
        "Statistics, cost table and the original's predictions serve all budgets. Each budget has its own plan, "
        "decomposition, recovery where it is asked for, checkpoint, evaluation and report.",
        style="dim",
    )


def _to_do(part: "Part") -> str:
    if part.is_finished:
        return "nothing, finished"
    if part.output.is_finished():
        return "evaluation and report"
    return "from the plan on"


def show_sweep(sweep: "Sweep") -> None:
    """The tables after a run."""
    first = sweep.results[0]
    measures = first.evaluation.measures() if first.evaluation else []
    quality = new_table("budget", "bits", "size", *(measure.title for measure in measures), title="Quality")
    work = new_table("budget", "embeddings", "predicted cost", "gap", "seconds", "version", title="Result")
    for done in sweep.results:
        plan, measured = done.plan, done.evaluation
        quality.add_row(
            plan.budget,
            f"{plan.bits_per_param:.4f}",
            human_bytes(done.size_bytes),
            *(measure.text() for measure in (measured.measures() if measured else [])),
        )
        seconds = sum(stage.seconds for stage in done.stages)
        cost, gap = f"{plan.expected_cost:.5g}", f"{plan.gap:.1e}"
        work.add_row(plan.budget, plan.embeddings_label, cost, gap, f"{seconds:.1f}", str(done.version))
    quality.add_row("original", "", human_bytes(first.original_bytes), *(measure.original for measure in measures))
    RESULTS.print(quality)
    RESULTS.print(work)
    RESULTS.print(f"The seconds of {first.plan.budget} include what all budgets share.")
    RESULTS.print(f"Compared in {sweep.folder / 'index.html'}", soft_wrap=True)


def show_plans(planned: "Sequence[Planned]") -> None:
    """The answer of `plan` for several budgets."""
    original_bytes = planned[0].model.folder_bytes
    table = new_table(
        *("budget", "bits", "bytes", "share", "embeddings", "cost", "gap"),
        title=f"Plans for {planned[0].model.spec}",
    )
    for made in planned:
        plan = made.plan
        table.add_row(
            plan.budget,
            f"{plan.bits_per_param:.4f}",
            f"{made.size_bytes:,}",
            f"{made.size_bytes / original_bytes:.1%}",
            plan.embeddings_label,
            f"{plan.expected_cost:.6g}",
            f"{plan.gap:.1e}",
        )
    RESULTS.print(table)
    RESULTS.print(
        "Bytes are of the whole folder, the share is of the original's. With one budget, `bitsmith plan` lists what "
        "every matrix gets."
    )
