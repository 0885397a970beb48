"""How the work of a stage is spread, where each matrix is treated by itself: over the cores here, GPUs, or by a flow.

A `MatrixTask` leaves one file a matrix, written whole or not at all, so that finished ones outlive a kill, and so that
the result is the same whoever made which of them, and in what order.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.memory import free_bytes
from pipeline.model import Matrix
from pipeline.parallel import map_in_order, map_in_processes, num_cores
from pipeline.stages import StageLog, peak_memory_bytes
from pipeline.working_memory import PROCESS_BYTES

PARAMS_FOR_PROCESSES = 2**23  # below, starting processes takes longer than the work


class MatrixTask(Protocol):
    """What one stage does to a matrix."""

    @property
    def stage(self) -> str:
        """Its name in reports and errors."""
        ...

    @property
    def device(self) -> str:
        """Where `make` computes: what the bytes depend on."""
        ...

    @property
    def has_small_operations(self) -> bool:
        """Would two matrices in one process hinder each other? See parallel.py."""
        ...

    def file(self, matrix: Matrix) -> Path:
        """Where the result is, once it is."""
        ...

    def make(self, matrix: Matrix) -> None:
        """Write the result, if it is not there."""
        ...

    def working_bytes(self, matrix: Matrix) -> int:
        """About what `make` takes at most, beside the process."""
        ...

    def settings(self, matrices: Sequence[Matrix]) -> dict[str, Any]:
        """Plain JSON that decides the results for these matrices, beside model and statistics."""
        ...


Spread = Callable[[MatrixTask, Sequence[Matrix]], Iterator[None]]


def over_cores(task: MatrixTask, matrices: Sequence[Matrix], log: StageLog | None = None) -> Iterator[None]:
    """Make every matrix's file, one job a core of this machine or as many as its memory holds; yields once for each.

    Args:
        log: told what memory the processes took.
    Raises:
        WorkerError: a process died.
    """
    in_processes = is_in_processes(task.has_small_operations, matrices)
    workers = num_workers(map(task.working_bytes, matrices), in_processes, free_bytes(torch.device("cpu")))
    each = map_in_processes if in_processes else map_in_order
    for peak_bytes in each(partial(_made, task), matrices, workers):
        if log:
            log.worker_took(peak_bytes)
        yield


def is_in_processes(has_small_operations: bool, matrices: Sequence[Matrix]) -> bool:
    """Do jobs run in processes of their own, rather than in threads of this one?"""
    return has_small_operations and sum(matrix.num_params for matrix in matrices) >= PARAMS_FOR_PROCESSES


def num_workers(working_bytes: Iterable[int], in_processes: bool, free: int, most: int | None = None) -> int:
    """How many jobs run side by side: one a core, or `most`, if so many of the largest fit into `free` bytes; at least
    one."""
    each = max(working_bytes, default=0) + in_processes * PROCESS_BYTES
    return max(1, min(most or num_cores(), free // each if each else 1))


def _made(task: MatrixTask, matrix: Matrix) -> int:
    """Peak memory of the process so far, in bytes."""
    task.make(matrix)
    return peak_memory_bytes()
