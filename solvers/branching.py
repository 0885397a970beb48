"""A tighter bound: try every position of the one row that the relaxation leaves half-way between two.

Where the bits run out, the relaxation takes a part of one step. With that row fixed, the others are
priced anew; most of its positions then cost too much to matter, and what is left is bounded well.
"""

from dataclasses import dataclass, replace

import numpy as np

from solvers.greedy import climb, fill
from solvers.lagrangian import HullSteps, Relaxation, relax
from solvers.reduction import ReducedProblem


@dataclass(frozen=True, eq=False)
class Branched:
    """The tighter relaxation, and the cheapest allocation met on the way, int64 [rows]."""

    relaxation: Relaxation
    position: np.ndarray


def branch(reduced: ReducedProblem, steps: HullSteps, spare_bits: int, position: np.ndarray) -> Branched:
    """Split `relax(reduced, steps, spare_bits)` on the row of the first step that does not fit.

    Args:
        position: int64 [rows], an allocation within `spare_bits`. The bounds are proven for all that are
            cheaper than the one returned.
    """
    row = int(steps.row[steps.num_fitting(spare_bits)])
    relaxations = []
    nowhere = np.full_like(reduced.cost, np.inf)
    fits = np.isfinite(reduced.cost[row]) & (reduced.extra_bits[row] <= spare_bits)
    for column in np.flatnonzero(fits).tolist():
        fixed, fixed_steps = _fix(reduced, row, column), _skip(reduced, steps, row, column)
        relaxation = relax(fixed, fixed_steps, spare_bits)
        if relaxation.lower_bound < reduced.total_cost(position):
            relaxations.append(relaxation)
            met = fill(fixed, climb(fixed, fixed_steps, spare_bits), spare_bits)
            position = min(position, met, key=reduced.total_cost)
    cost = reduced.total_cost(position)
    return Branched(
        Relaxation(
            price=float(steps.saving_per_bit[steps.num_fitting(spare_bits)]),
            lower_bound=min([cost, *(relaxation.lower_bound for relaxation in relaxations)]),
            bound_through=np.min([nowhere, *(relaxation.bound_through for relaxation in relaxations)], axis=0),
        ),
        position,
    )


def _fix(reduced: ReducedProblem, row: int, column: int) -> ReducedProblem:
    cost = reduced.cost.copy()
    cost[row] = np.inf
    cost[row, column] = reduced.cost[row, column]
    return replace(reduced, cost=cost)


def _skip(reduced: ReducedProblem, steps: HullSteps, row: int, column: int) -> HullSteps:
    start = steps.start.copy()
    start[row] = column
    others = steps.row != row
    return HullSteps(
        start=start,
        start_bits=reduced.total_extra_bits(start),
        row=steps.row[others],
        position=steps.position[others],
        extra_bits=steps.extra_bits[others],
        saving_per_bit=steps.saving_per_bit[others],
    )
