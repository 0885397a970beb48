"""A good allocation at once: spend the bits where they save most, then mend what is left over.

The hulls' steps are taken in order as far as they fit, later smaller ones included; what remains is
spent on single moves. It starts the integer program, and often is the answer.
"""

import numpy as np

from solvers.lagrangian import HullSteps
from solvers.reduction import ReducedProblem


def climb(reduced: ReducedProblem, steps: HullSteps, spare_bits: int) -> np.ndarray:
    """Take the hulls' steps by falling saving per bit; a row whose step does not fit stays where it is.

    Returns:
        A position per row, int64 [rows], at most `spare_bits` above the smallest size.
    """
    num_fitting = steps.num_fitting(spare_bits)
    position = steps.start.copy()
    np.maximum.at(position, steps.row[:num_fitting], steps.position[:num_fitting])
    left_bits = spare_bits - reduced.total_extra_bits(position)

    has_stopped = np.zeros(len(position), dtype=bool)
    later = zip(*(a[num_fitting:].tolist() for a in (steps.row, steps.position, steps.extra_bits)), strict=True)
    for row, end, extra_bits in later:
        if has_stopped[row]:
            continue
        if extra_bits <= left_bits:
            position[row] = end
            left_bits -= extra_bits
        else:
            has_stopped[row] = True
    return position


def fill(reduced: ReducedProblem, position: np.ndarray, spare_bits: int) -> np.ndarray:
    """Make the single move that saves most until none fits; ties break by row and position."""
    position = position.copy()
    rows = np.arange(len(position))
    while True:
        saving = reduced.cost[rows, position][:, None] - reduced.cost
        extra_bits = reduced.extra_bits - reduced.extra_bits[rows, position][:, None]
        left_bits = spare_bits - reduced.total_extra_bits(position)
        saving = np.where(extra_bits <= left_bits, saving, -np.inf)
        row, best = np.unravel_index(int(np.argmax(saving)), saving.shape)
        if saving[row, best] <= 0:
            return position
        position[row] = best
