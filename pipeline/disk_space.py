"""How much a run writes at most, and whether the disks have room for it: known before the work."""

import errno
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from pipeline.budget import human_bytes
from pipeline.errors import DiskSpaceError
from registry import DiskFullError

if TYPE_CHECKING:
    from pipeline.run import Run


def disk_bytes(run: "Run") -> int:
    """What the run writes at most, in the registry and beside it."""
    return checkpoint_disk_bytes(run) + shared_disk_bytes(run)


def checkpoint_disk_bytes(run: "Run") -> int:
    """The part of it that every budget needs for itself."""
    return _of_a_budget(run).total()


def shared_disk_bytes(run: "Run") -> int:
    """The part that all budgets share."""
    return _shared(run).total()


def stage_disk_bytes(run: "Run") -> Mapping[str, int]:
    """What each stage writes at most, by its name; 0 for what writes nothing that counts."""
    return _of_a_budget(run) + _shared(run)


def _of_a_budget(run: "Run") -> Counter[str]:
    """Packed weights and those of a rival (rival.py), the checkpoint and its copy in the folder, and recovery."""
    from pipeline.allocation import AS_STORED

    model, sizes = run.model, run.sizes
    around = model.folder_bytes - sum(model.tensors[matrix.name].size_bytes for matrix in model.matrices)
    packed = {}
    for each in sizes.embedding_sets:
        tables = sum(planned.size_bits // 8 for planned in each.values() if planned.label != AS_STORED)
        compressed = sizes.compressed_bytes_beside(each)
        packed[compressed + around - sizes.saved_bytes(each)] = compressed + 2 * tables  # also by themselves
    whole = max(packed)
    written = Counter(decompose=packed[whole], checkpoint=2 * whole)
    if run.texts.evaluation is not None:
        written["decompose"] += sizes.compressed_bytes
    if run.texts.recovery is not None:
        written["recover"] += 2 * sizes.compressed_bytes + _training_bytes(run)
    return written


def _shared(run: "Run") -> Counter[str]:
    """Statistics, embeddings in each way that is on offer, and the original's answers for recovery and evaluation."""
    from pipeline.allocation import AS_STORED, free_to_choose
    from pipeline.base_logits import LIMIT_BYTES, cache_bytes

    written = Counter(statistics=statistics_disk_bytes(run))
    for choices in free_to_choose(run.embeddings).values():  # all of them packed, and the largest copied
        packed_bits = [each.size_bits for each in choices if each.label != AS_STORED]
        written["embeddings"] += (sum(packed_bits) + max(packed_bits)) // 8
    if run.texts.recovery is not None:
        settings, width = run.recovery_settings, run.model.config.get_text_config().hidden_size
        bytes_a_token = 2 + 6 * settings.num_top + 2 * width * (settings.hidden_weight > 0)  # see teacher.py
        if not run.model.task.generates:
            bytes_a_token = run.model.task.answer_bytes(run.model.config)
        written["recover"] += bytes_a_token * run.texts.recovery.tokens.numel()
    if run.texts.evaluation is not None:
        written["evaluate"] += min(LIMIT_BYTES, cache_bytes(run.model.config, run.texts.evaluation.tokens))
    return written


def statistics_disk_bytes(run: "Run") -> int:
    """The part of that for statistics, and for what passes between blocks while they are collected."""
    from pipeline.curvature_sums import sums_of
    from pipeline.statistics import most_windows_at_once
    from pipeline.summed_parts import PART_WINDOWS, layers_of, sum_bytes

    if run.texts.calibration is None:
        return 0
    num_windows, seq_len = run.texts.calibration.tokens.shape
    at_once, total = min(PART_WINDOWS, num_windows), 0
    if run.recipe.sensitivity != "none":  # of all layers, and of the one that is written anew
        sums, matrices = sums_of(run.recipe.sensitivity), run.model.matrices
        layers = [[each for each in matrices if each.layer == layer] for layer in layers_of(run.model)]
        total = sum_bytes(matrices, sums) + max(sum_bytes(layer, sums) for layer in layers)
        at_once = most_windows_at_once(sums, num_windows)
    num_layers, width = len(layers_of(run.model)), run.model.config.get_text_config().hidden_size
    return total + 4 * (num_layers + 3) * width * at_once * seq_len  # layered_pass.py


def check_disk(runs: Sequence["Run"], out: Path) -> None:
    """Raise DiskSpaceError if the registry's disk or the output's cannot hold what is yet to be written.

    Args:
        runs: that are not finished, and differ in the budget alone. Statistics are shared; where an earlier run has
            left some of them, that much less is needed.
    """
    if not runs:
        return
    needed = max(map(shared_disk_bytes, runs)) + sum(map(checkpoint_disk_bytes, runs)) - _statistics_kept(runs[0])
    for place in (runs[0].registry.root, _existing(out)):
        free = shutil.disk_usage(place).free
        if free < needed:
            raise DiskSpaceError(
                f"The run writes up to {human_bytes(needed)}, and the disk of {place} has {human_bytes(free)} "
                f"free. {_less(runs[0], needed)}Free some space, point BITSMITH_HOME at a larger disk, or write to one "
                "with -o."
            )


def _statistics_kept(run: "Run") -> int:
    if not run.resume:
        return 0
    whole = statistics_disk_bytes(run)
    return whole if run.has_statistics() else min(whole, run.statistics_work_bytes())


def _less(run: "Run", needed: int) -> str:
    """Advice, where the statistics take most of it and others would not."""
    small = replace(run, recipe=run.recipe.model_copy(update={"sensitivity": "factored"}))
    now, then = statistics_disk_bytes(run), statistics_disk_bytes(small)
    if _statistics_kept(run) or now < needed / 2 or then > now / 2:
        return ""
    return (
        f"{human_bytes(now)} of it are statistics, of which `--sensitivity factored` would write {human_bytes(then)}, "
        "for a somewhat worse checkpoint. "
    )


@contextmanager
def disk_may_fill(run: "Run", folder: Path) -> Iterator[None]:
    """Inside, a full disk, of `folder` or of the registry, is a DiskSpaceError that says how much the run writes."""
    with disk_may_fill_up(folder, disk_bytes(run)):
        yield


@contextmanager
def disk_may_fill_up(folder: Path, size_bytes: int) -> Iterator[None]:
    """The same for work of whatever kind that writes up to `size_bytes`."""
    try:
        yield
    except (OSError, SafetensorError, DiskFullError) as error:
        if isinstance(error, DiskSpaceError) or not _is_disk_full(error):
            raise
        if isinstance(error, DiskFullError):  # which knows the disk
            raise DiskSpaceError(
                f"{error} The whole run writes up to {human_bytes(size_bytes)}. What is finished is kept: run the same "
                "command again."
            ) from error
        place = _existing(folder)
        free_bytes = shutil.disk_usage(place).free
        raise DiskSpaceError(
            f"The disk of {place} is full: {human_bytes(free_bytes)} are free, and the whole run writes up to "
            f"{human_bytes(size_bytes)}. What is finished is kept: free some space, and run the same command "
            "again."
        ) from error


def _is_disk_full(error: OSError | SafetensorError | DiskFullError) -> bool:
    if isinstance(error, DiskFullError):
        return True
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"(os error {number})" in str(error) for number in full)


def _training_bytes(run: "Run") -> int:
    """Of two saves of a recovery at most: float32 values, moments and best values; norms and gains hardly count."""
    return 2 * 4 * 4 * sum(max(run.recipe.ranks, default=0) * sum(matrix.shape) for matrix in run.model.matrices)


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
