"""The two steps of a run that packed embeddings add: what the head reads, and the packed tables.

Both are the same at every budget, and found again by all of them. Neither is a stage of its own: the first belongs to
the statistics, the second to the decomposition.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.disk_space import disk_may_fill
from pipeline.embeddings import gives_logits, pack_embeddings
from pipeline.head_curvature import CURVATURE_FILE, collect_head_curvature, read_curvature

if TYPE_CHECKING:
    from pipeline.calibration import TokenWindows
    from pipeline.run import Run
    from registry import Artifact


def weighs_head(run: "Run") -> bool:
    """Is something packed under what the head reads? Not without calibration text, and not where no head is asked."""
    is_asked = run.texts.calibration is not None and run.model.task.generates
    return is_asked and any(gives_logits(run.model, module) for module in run.embeddings)


def head_curvature(run: "Run") -> "Artifact | None":
    """Its second moment over the windows of the statistics; None where that is not wanted."""
    windows = run.texts.calibration
    if windows is None or not weighs_head(run):
        return None

    def build(work: Path) -> None:
        with disk_may_fill(run, work):
            collect_head_curvature(run.model, windows.tokens, work, device=run.device, progress=run.progress)

    return run.registry.step("head_curvature", (), _settings(run, windows), build, progress=run.progress)


def has_head_curvature(run: "Run") -> bool:
    """Is it in the registry, or not wanted?"""
    windows = run.texts.calibration
    if windows is None or not weighs_head(run):
        return True
    return run.registry.has_step("head_curvature", (), _settings(run, windows)) is not None


def _settings(run: "Run", windows: "TokenWindows") -> dict[str, Any]:
    return run.keyed({"model": run.model.digest, "tokens": windows.sha256, "device": run.device})


def packed_embeddings(run: "Run") -> "Artifact | None":
    """Embeddings and head as the recipe packs them; None where it does not."""
    if not run.embeddings:
        return None
    found = head_curvature(run)

    def build(work: Path) -> None:
        curvature = read_curvature(run.registry.path(found, CURVATURE_FILE)) if found else None
        with disk_may_fill(run, work):
            pack_embeddings(run.model, run.embeddings, curvature, work, progress=run.progress)

    settings = {"model": run.model.digest, "labels": {name: each.label for name, each in run.embeddings.items()}}
    parents = (found.digest,) if found else ()
    return run.registry.step("embeddings", parents, run.keyed(settings), build, progress=run.progress)
