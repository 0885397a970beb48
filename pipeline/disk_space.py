"""How much a run writes at most, and whether the disks have room for it: known before the work."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from pipeline.budget import human_bytes
from pipeline.errors import DiskSpaceError

if TYPE_CHECKING:
    from pipeline.run import Run


def disk_bytes(run: "Run") -> int:
    """What the run writes at most, in the registry and beside it."""
    return checkpoint_disk_bytes(run) + shared_disk_bytes(run)


def checkpoint_disk_bytes(run: "Run") -> int:
    """The part of it that every budget needs for itself: matrices, checkpoint, output folder, and recovery."""
    model = run.model
    around = model.size_bytes - sum(model.tensors[matrix.name].size_bytes for matrix in model.matrices)
    sizes = run.sizes
    total = 3 * max(
        sizes.compressed_bytes_beside(each) + around - sizes.saved_bytes(each) for each in sizes.embedding_sets
    )
    if run.texts.recovery is not None:
        total += 2 * sizes.compressed_bytes + _training_bytes(run)
    return total


def shared_disk_bytes(run: "Run") -> int:
    """The part that all budgets share: statistics, and the original's predictions for recovery and evaluation."""
    from pipeline.allocation import AS_STORED, free_to_choose
    from pipeline.base_logits import LIMIT_BYTES
    from pipeline.curvature_sums import sums_of
    from pipeline.summed_parts import PART_WINDOWS, layers_of, sum_bytes

    total = 0
    if run.texts.calibration is not None:
        if run.recipe.sensitivity != "none":  # of a part, of all parts so far, and while it is put into the registry
            total += 3 * sum_bytes(run.model.matrices, sums_of(run.recipe.sensitivity))
        num_layers, width = len(layers_of(run.model)), run.model.config.get_text_config().hidden_size
        total += 4 * (num_layers + 3) * width * PART_WINDOWS * run.texts.calibration.tokens.shape[1]  # layered_pass.py
    for choices in free_to_choose(run.embeddings).values():  # all of them packed, and the largest copied
        packed_bits = [each.size_bits for each in choices if each.label != AS_STORED]
        total += (sum(packed_bits) + max(packed_bits)) // 8
    if run.texts.recovery is not None:
        settings, width = run.recovery_settings, run.model.config.get_text_config().hidden_size
        bytes_a_token = 2 + 6 * settings.num_top + 2 * width * (settings.hidden_weight > 0)  # see teacher.py
        if not run.model.task.generates:
            bytes_a_token = run.model.task.answer_bytes(run.model.config)
        total += bytes_a_token * run.texts.recovery.tokens.numel()
    if run.texts.evaluation is not None:
        answer_bytes = run.model.task.answer_bytes(run.model.config)
        total += min(LIMIT_BYTES, answer_bytes * run.texts.evaluation.tokens.numel())
    return total


def check_disk(run: "Run", out: Path, needed_bytes: int | None = None) -> None:
    """Raise DiskSpaceError if the registry's disk or the output's cannot hold what will be written.

    Args:
        needed_bytes: where more is written than by this run alone (`disk_bytes`).
    """
    needed = disk_bytes(run) if needed_bytes is None else needed_bytes
    for place in (run.registry.root, _existing(out)):
        free = shutil.disk_usage(place).free
        if free < needed:
            raise DiskSpaceError(
                f"The run writes up to {human_bytes(needed)}, and the disk of {place} has {human_bytes(free)} "
                "free. Free some space, point BITSMITH_HOME at a larger disk, or write to one with -o."
            )


@contextmanager
def disk_may_fill(run: "Run", folder: Path) -> Iterator[None]:
    """Inside, a full disk under `folder` is a DiskSpaceError that says how much the run writes."""
    with disk_may_fill_up(folder, disk_bytes(run)):
        yield


@contextmanager
def disk_may_fill_up(folder: Path, size_bytes: int) -> Iterator[None]:
    """The same for work of whatever kind that writes up to `size_bytes`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_disk_full(error):
            raise
        place = _existing(folder)
        free_bytes = shutil.disk_usage(place).free
        raise DiskSpaceError(
            f"The disk of {place} is full: {human_bytes(free_bytes)} are free, and the whole run writes up to "
            f"{human_bytes(size_bytes)}. What is finished is kept: free some space, and run the same command "
            "again."
        ) from error


def _is_disk_full(error: OSError | SafetensorError) -> bool:
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
