"""What the command line shows: progress bars with an estimate of the time left, and tables.

Everything goes to standard error but results, so that `--json` can be piped.
"""

import time
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rich import box
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pipeline.budget import human_bytes
from pipeline.disk_space import disk_bytes
from pipeline.plain_console import PlainConsole, shown
from pipeline.stage_table import stage_table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipeline.calibration import TokenWindows
    from pipeline.compress import Compressed
    from pipeline.eval_report import EvalReport
    from pipeline.forecast import StageForecast
    from pipeline.model import Model
    from pipeline.planning import Planned
    from pipeline.run import Run

T = TypeVar("T")
ERRORS = PlainConsole(stderr=True)
RESULTS = PlainConsole()
MINUTE, HOUR = 60, 3600
SECONDS_BETWEEN_LINES = 10.0
SECONDS_WORTH_A_LINE = 1.0


class Bars:
    """Progress on standard error: bars in a terminal, kept when done; elsewhere a line every few seconds."""

    def track(self, items: Iterable[T], description: str, total: int | None = None, done: int = 0) -> Iterator[T]:
        """See pipeline/progress.py."""
        return (self._bar if ERRORS.is_terminal else self._lines)(items, description, total, done)

    def say(self, message: str) -> None:
        """See pipeline/progress.py."""
        ERRORS.print(message, style="dim", soft_wrap=True)

    def _lines(self, items: Iterable[T], description: str, total: int | None, done: int) -> Iterator[T]:
        started = shown = time.monotonic()
        before = done
        for item in items:
            yield item
            done += 1
            now = time.monotonic()
            if now - shown >= SECONDS_BETWEEN_LINES and done != total:
                rate = (now - started) / (done - before)
                left = f", about {rate * (total - done):.0f} s left" if total else ""
                ERRORS.print(f"{description}: {done} of {total or '?'}{left}", soft_wrap=True, highlight=False)
                shown = now
        seconds = time.monotonic() - started
        if seconds >= SECONDS_WORTH_A_LINE:
            ERRORS.print(f"{description}: done, {done} in {seconds:.1f} s", soft_wrap=True, highlight=False)

    def _bar(self, items: Iterable[T], description: str, total: int | None, done: int) -> Iterator[T]:
        columns = (
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        with Progress(*columns, console=ERRORS) as bars:
            task = bars.add_task(shown(description), total=total, completed=done)
            for item in items:
                yield item
                bars.advance(task)


def new_table(*headers: str, title: str) -> Table:
    """With headers: names at the left, figures at the right. Without: a list of facts."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", show_header=bool(headers))
    for position, header in enumerate(headers):
        justify: Literal["left", "right"] = "left" if position == 0 else "right"
        table.add_column(header, justify=justify, overflow="fold", no_wrap=position > 0)
    return table


def show_model(model: "Model") -> None:
    """The answer of `inspect`."""
    prefix = _common_prefix([matrix.module for matrix in model.matrices])
    title = f"Matrices of {model.spec} (names go on after {prefix})" if prefix else f"Matrices of {model.spec}"
    table = new_table("matrix", "shape", "parameters", "stored as", "same input as", title=title)
    for matrix in model.matrices:
        shape = f"{matrix.shape[0]} x {matrix.shape[1]}"
        first = next(other for other in model.matrices if other.group == matrix.group)
        shared = "" if first is matrix else first.kind
        name = matrix.module.removeprefix(prefix)
        table.add_row(name, shape, f"{matrix.num_params:,}", matrix.dtype, shared)
    RESULTS.print(table)
    skipped = new_table("reason", "tensors", "size", "for example", title="Left as they are")
    for reason, entries in _by_reason(model).items():
        size = human_bytes(sum(entry.size_bytes for entry in entries))
        skipped.add_row(reason, str(len(entries)), size, entries[0].name)
    RESULTS.print(skipped)
    share = model.num_matrix_params / model.num_params
    RESULTS.print(
        f"{len(model.matrices)} matrices in {len(model.groups())} groups, {model.num_matrix_params:,} of "
        f"{model.num_params:,} parameters ({share:.1%}); {human_bytes(model.size_bytes)} of weights"
    )
    if model.embeddings:
        names = " and ".join(each.module for each in model.embeddings)
        RESULTS.print(f"{names}: packed too where --embeddings says so, or where that pays within a budget in bytes")


def _common_prefix(names: list[str]) -> str:
    """The parts that all names start with: printed once, not in every row."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    shared = [same[0] for same in takewhile(lambda same: len(set(same)) == 1, parts)]
    return "".join(f"{part}." for part in shared)


def _by_reason(model: "Model") -> dict[str, list[Any]]:
    reasons: dict[str, list[Any]] = {}
    for entry in model.skipped:
        reasons.setdefault(entry.reason, []).append(entry)
    return reasons


def show_start(run: "Run", out: "Path") -> None:
    """What a run is about to do, before it does it."""
    table = new_table(title="Plan of the run")
    table.add_row("budget", f"{run.recipe.budget} (smallest plan: {smallest_plan(run)})")
    add_run_rows(table, run)
    table.add_row("disk", f"up to {human_bytes(disk_bytes(run))} for results and intermediate files")
    table.add_row("output", str(out))
    ERRORS.print(table)
    show_forecast(run.log.forecasts)


def show_forecast(stages: "Sequence[StageForecast]") -> None:
    """What the stages will take, before they run."""
    on_device = any(stage.device_bytes for stage in stages)
    headers = ("stage", "about", "peak memory", "all processes", *(["on the GPU"] if on_device else []), "disk, up to")
    table = new_table(*headers, title="Forecast")
    for stage in stages:
        device = [human_bytes(stage.device_bytes)] if on_device else []
        memory = (human_bytes(stage.memory_bytes), human_bytes(stage.total_bytes))
        disk = human_bytes(stage.disk_bytes) if stage.disk_bytes else ""
        table.add_row(stage.name, human_seconds(stage.seconds), *memory, *device, disk)
    ERRORS.print(table)


def human_seconds(seconds: float) -> str:
    """About so long: 40 s, 12 min, 3.5 h."""
    if seconds < MINUTE:
        return f"{seconds:.0f} s"
    return f"{seconds / MINUTE:.0f} min" if seconds < HOUR else f"{seconds / HOUR:.1f} h"


def add_run_rows(table: Table, run: "Run") -> None:
    """What is the same at every budget: the model, the choices, the texts, and what was measured before."""
    from pipeline.allocation import AS_STORED, EMBEDDINGS_ADVICE, free_to_choose
    from pipeline.embedding_steps import has_embedding_costs

    recipe, model = run.recipe, run.model
    table.add_row("model", f"{recipe.model}, {len(model.matrices)} matrices, {model.num_matrix_params:,} parameters")
    table.add_row("original", human_bytes(model.size_bytes))
    table.add_row("choices", f"{len(run.labels)} a matrix, ranks {', '.join(map(str, sorted({0, *recipe.ranks})))}")
    if model.embeddings and not run.embeddings:
        size_bytes = sum(model.tensors[each.name].size_bytes for each in model.embeddings)
        advice = f"; {EMBEDDINGS_ADVICE} packs them" if recipe.embeddings is None else ""
        table.add_row("embeddings", f"{human_bytes(size_bytes)}, as they are{advice}")
    free = free_to_choose(run.embeddings)
    for module, choices in run.embeddings.items():
        first, last = choices[0], choices[-1]
        size = human_bytes(first.size_bits / 8)
        if module in free:
            said = f"{module}: {AS_STORED} ({size}) to {last.label} ({human_bytes(last.size_bits / 8)}), what pays most"
            table.add_row("embeddings", said)
        else:
            table.add_row("packed too", f"{module} as {first.label}, {size}")
    if calibration := run.texts.calibration:
        table.add_row("calibration", _windows(calibration))
        table.add_row("statistics", _reused(run.resume and run.has_statistics()))
    else:
        table.add_row("statistics", "none: unweighted error")
    table.add_row("cost table", _reused(run.resume and run.has_costs()))
    if free:
        table.add_row("embedding costs", _reused(run.resume and has_embedding_costs(run)))
    if evaluation := run.texts.evaluation:
        table.add_row("evaluation", _windows(evaluation))
    if recovery := run.texts.recovery:
        settings = run.recovery_settings
        held_out = settings.num_held_out(len(recovery))
        trained = f"{', '.join(settings.train)}, up to {settings.steps} steps"
        table.add_row("recovery", f"{trained} on {_windows(recovery)}, {held_out} windows held out")
    table.add_row("device", run.device)


def _windows(windows: "TokenWindows") -> str:
    return f"{windows.tokens.shape[0]} x {windows.tokens.shape[1]} tokens of {windows.source}"


def _reused(is_there: bool) -> str:
    return "in the registry from an earlier run" if is_there else "to be measured, and kept in the registry"


def smallest_plan(run: "Run") -> str:
    """Bits per parameter below which no budget may be."""
    return f"{run.smallest_bits / run.model.num_matrix_params:.3f} bits per parameter"


def show_result(done: "Compressed") -> None:
    """The table after a run."""
    if done.evaluation is not None:
        show_evaluation(done.evaluation)
    headers, rows = stage_table(done.stages)
    stages = new_table(*headers, title="Stages")
    for row in rows:
        stages.add_row(*row)
    RESULTS.print(stages)
    table = new_table(title="Result")
    table.add_row("bits per parameter", f"{done.plan.bits_per_param:.4f} (budget {done.plan.budget})")
    table.add_row("size", f"{human_bytes(done.original_bytes)} -> {human_bytes(done.size_bytes)}")
    if done.plan.embeddings:
        table.add_row("embeddings", done.plan.embeddings_label)
    table.add_row("allocation", f"{done.plan.status}, gap {done.plan.gap:.1e}, {done.plan.solver}")
    if done.recovery is not None:
        table.add_row("recovery", done.recovery.meaning)
    table.add_row("folder", str(done.folder))
    table.add_row("report", str(done.folder / "report" / "index.html"))
    table.add_row("registry", f"{done.version} ({done.version.digest[:12]})")
    RESULTS.print(table)


def show_plan(made: "Planned") -> None:
    """The answer of `plan`."""
    plan = made.plan
    prefix = _common_prefix(list(plan.matrices))
    title = f"Plan for {made.model.spec} (names go on after {prefix})" if prefix else f"Plan for {made.model.spec}"
    table = new_table("matrix", "shape", "choice", "bits", "size", "cost", title=title)
    for name, matrix in plan.matrices.items():
        shape = f"{matrix.shape[0]}x{matrix.shape[1]}"
        bits = f"{matrix.bits_per_param:.3f}"
        table.add_row(
            name.removeprefix(prefix),
            shape,
            matrix.label,
            bits,
            human_bytes(matrix.size_bits / 8),
            f"{matrix.cost:.4g}",
        )
    for name, embedding in plan.embeddings.items():
        shape, bits = f"{embedding.shape[0]}x{embedding.shape[1]}", f"{embedding.bits_per_param:.3f}"
        size_bytes = embedding.size_bits / 8
        cost = "" if embedding.cost is None else f"{embedding.cost:.4g}"
        table.add_row(name.removeprefix(prefix), shape, embedding.label, bits, human_bytes(size_bytes), cost)
    RESULTS.print(table)
    files = new_table("file", "bytes", title="Forecast")
    for name, size in made.files_bytes.items():
        files.add_row(name, f"{size:,}")
    files.add_row("total", f"{made.size_bytes:,}")
    RESULTS.print(files)
    among = "no plan with these embeddings" if plan.embeddings else "no plan"
    RESULTS.print(
        f"{plan.bits_per_param:.4f} bits per parameter (budget {plan.budget}), predicted cost "
        f"{plan.predicted_cost:.6g}, {among} costs less than {plan.lower_bound:.6g} (gap {plan.gap:.1e}, {plan.solver})"
    )


def show_evaluation(report: "EvalReport") -> None:
    """The answer of `evaluate`."""
    table = new_table("", "original", "compressed", title="Quality")
    for label, original, compressed in report.rows():
        table.add_row(label, original, compressed)
    RESULTS.print(table)
