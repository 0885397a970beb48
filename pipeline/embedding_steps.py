"""The steps of a run that packed embeddings add: what the head reads, the packed tables, and what they cost.

All are the same at every budget, and found again by all of them. What tables cost is a stage of its own where the
program chooses, and then makes the other two; where the recipe names a quantizer, what the head reads belongs to the
statistics, and the table to the decomposition.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.allocation import Offered, PlannedEmbedding, free_to_choose
from pipeline.atomic import write_json
from pipeline.decompose import matrix_file, read_quantized
from pipeline.disk_space import disk_may_fill
from pipeline.embedding_costs import MOST_WINDOWS, divergence_of_tables
from pipeline.embeddings import gives_logits, pack_embedding, packable
from pipeline.head_curvature import CURVATURE_FILE, collect_head_curvature, read_curvature

if TYPE_CHECKING:
    from pipeline.calibration import TokenWindows
    from pipeline.run import Run
    from registry import Artifact

COSTS_FILE = "costs.json"


def weighs_head(run: "Run") -> bool:
    """Is something packed, or may be, under what the head reads? Not without calibration text, and not in encoders."""
    is_asked = run.texts.calibration is not None and run.model.task.generates
    return is_asked and any(gives_logits(run.model, module) for module in run.embeddings)


def head_curvature(run: "Run", *, anew: bool = False) -> "Artifact | None":
    """Its second moment over the windows of the statistics but `_held_out`; None where that is not wanted."""
    windows = run.texts.calibration
    if windows is None or not weighs_head(run):
        return None

    def build(work: Path) -> None:
        tokens = windows.tokens[: len(windows) - _held_out(windows)]
        with disk_may_fill(run, work):
            collect_head_curvature(run.model, tokens, work, device=run.device, progress=run.progress)

    settings = _settings(run, windows)
    return run.registry.step("head_curvature", (), settings, build, resume=not anew, progress=run.progress)


def has_head_curvature(run: "Run") -> bool:
    """Is it in the registry, or not wanted?"""
    windows = run.texts.calibration
    if windows is None or not weighs_head(run):
        return True
    return run.registry.has_step("head_curvature", (), _settings(run, windows)) is not None


def packed_embedding(run: "Run", module: str, planned: PlannedEmbedding, *, anew: bool = False) -> "Artifact":
    """Embeddings or a head, packed."""
    found = head_curvature(run) if gives_logits(run.model, module) else None

    def build(work: Path) -> None:
        curvature = read_curvature(run.registry.path(found, CURVATURE_FILE)) if found else None
        with disk_may_fill(run, work):
            pack_embedding(run.model, module, planned, curvature, work, progress=run.progress)

    settings = {"model": run.model.digest, "module": module, "label": planned.label}
    parents = (found.digest,) if found else ()
    keyed = run.keyed(settings)
    return run.registry.step("embedding", parents, keyed, build, resume=not anew, progress=run.progress)


def embedding_costs(run: "Run", *, anew: bool = False) -> "Artifact | None":
    """What each choice costs, where there is a choice.

    Args:
        anew: whatever is in the registry.
    """
    windows, settings = run.texts.calibration, _costs_settings(run)
    if windows is None or settings is None:
        return None
    if not anew and (found := run.registry.has_step("embedding_costs", (), settings)):  # also in one that is only read
        return found

    def build(work: Path) -> None:
        head_curvature(run, anew=anew)
        free = free_to_choose(run.embeddings)
        planned = [(module, each) for module, choices in free.items() for each in packable(choices)]
        packed = {each: packed_embedding(run, *each, anew=anew) for each in planned}
        tables = {
            (module, each.label): partial(_dense, run, module, each, packed[module, each]) for module, each in planned
        }
        tokens = windows.tokens[-MOST_WINDOWS:]
        with disk_may_fill(run, work):
            costs = divergence_of_tables(run.model, tables, tokens, work, device=run.device, progress=run.progress)
            (work / "out").mkdir(exist_ok=True)
            write_json(work / "out" / COSTS_FILE, costs)

    # the tables are no parents: those that are not chosen may be collected as garbage
    return run.registry.step("embedding_costs", (), settings, build, resume=not anew, progress=run.progress)


def has_embedding_costs(run: "Run") -> bool:
    """Are they in the registry, or not wanted?"""
    settings = _costs_settings(run)
    return settings is None or run.registry.has_step("embedding_costs", (), settings) is not None


def with_costs(run: "Run", costs: "Artifact | None") -> Offered:
    """What is on offer for the embeddings, with what was measured."""
    if costs is None:
        return run.embeddings
    found = json.loads(run.registry.path(costs, COSTS_FILE).read_text())
    return {
        module: tuple(replace(each, cost=found.get(module, {}).get(each.label, each.cost)) for each in choices)
        for module, choices in run.embeddings.items()
    }


def _dense(run: "Run", module: str, planned: PlannedEmbedding, packed: "Artifact") -> Tensor:
    return read_quantized(run.registry.path(packed, matrix_file(module)), planned).dequantize()


def _held_out(windows: "TokenWindows") -> int:
    """Windows that tables are measured on, and that rounding knows nothing of where there are enough others."""
    return MOST_WINDOWS if len(windows) > 2 * MOST_WINDOWS else 0


def _settings(run: "Run", windows: "TokenWindows") -> dict[str, Any]:
    keyed = {"model": run.model.digest, "tokens": windows.sha256, "device": run.device}
    return run.keyed(keyed | {"held_out": _held_out(windows)})


def _costs_settings(run: "Run") -> dict[str, Any] | None:
    windows, free = run.texts.calibration, free_to_choose(run.embeddings)
    if windows is None or not free:
        return None
    offered = {module: [each.label for each in packable(choices)] for module, choices in free.items()}
    return _settings(run, windows) | {"offered": offered, "most_windows": MOST_WINDOWS}
