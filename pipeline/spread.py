"""How the work of a stage is spread, where each matrix is treated by itself: over the cores here, or by a flow.

A `MatrixTask` leaves one file a matrix, written whole or not at all, so that finished ones outlive a kill, and so that
the result is the same whoever made which of them, and in what order.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pipeline.model import Matrix
from pipeline.parallel import map_in_order, map_in_processes
from pipeline.stages import StageLog, peak_memory_bytes

PARAMS_FOR_PROCESSES = 2**23  # below, starting processes takes longer than the work


class MatrixTask(Protocol):
    """What one stage does to a matrix."""

    @property
    def stage(self) -> str:
        """Its name in reports and errors."""
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

    def settings(self, matrices: Sequence[Matrix]) -> dict[str, Any]:
        """Plain JSON that decides the results for these matrices, beside model and statistics."""
        ...


Spread = Callable[[MatrixTask, Sequence[Matrix]], Iterator[None]]


def over_cores(task: MatrixTask, matrices: Sequence[Matrix], log: StageLog | None = None) -> Iterator[None]:
    """Make every matrix's file with one job a core of this machine; yields once for each.

    Args:
        log: told what memory the processes took.
    Raises:
        WorkerError: a process died.
    """
    num_params = sum(matrix.num_params for matrix in matrices)
    in_processes = task.has_small_operations and num_params >= PARAMS_FOR_PROCESSES
    for peak_bytes in (map_in_processes if in_processes else map_in_order)(partial(_made, task), matrices):
        if log:
            log.worker_took(peak_bytes)
        yield


def _made(task: MatrixTask, matrix: Matrix) -> int:
    """Peak memory of the process so far, in bytes."""
    task.make(matrix)
    return peak_memory_bytes()
