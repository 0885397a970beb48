"""Close the gap between an allocation and its bound: fix what cannot improve, solve the rest exactly.

A position whose bound exceeds the known cost is in no better allocation, and leaves the program. What the
solver answers is checked in exact integers; where its tolerance overspent, it is asked again for less.
"""

from dataclasses import dataclass, replace

import numpy as np

from solvers.lagrangian import ROUNDING, Relaxation
from solvers.pulp_milp import SOLVERS, ChangeProgram, Changes
from solvers.reduction import ReducedProblem

SHARE_FOR_SOLVER = 0.9
"""Of the allowed gap; the rest covers the tolerance that is given away from the solver's bound."""
MOST_TIGHTENINGS = 3


@dataclass(frozen=True, eq=False)
class Closed:
    """The outcome.

    Attributes:
        position: int64 [rows], the cheaper of the known allocation and the solver's.
        lower_bound: no allocation within the budget costs less.
        solver: what proved it.
    """

    position: np.ndarray
    lower_bound: float
    solver: str


def close_gap(
    reduced: ReducedProblem,
    relaxation: Relaxation,
    known: Closed,
    spare_bits: int,
    *,
    solver: str,
    relative_gap: float,
    time_limit_seconds: float,
) -> Closed:
    """Look for the changes of the known allocation that save the most, and prove how much is left to save."""
    position = known.position
    cost = reduced.total_cost(position)
    row, column = _candidates(relaxation, position, cost)
    if not len(row):
        return Closed(position, cost, "lagrangian")
    before = (row, position[row])
    program = ChangeProgram(
        row=row,
        added_cost=reduced.cost[row, column] - reduced.cost[before],
        extra_bits=reduced.extra_bits[row, column] - reduced.extra_bits[before],
        spare_bits=spare_bits - reduced.total_extra_bits(position),
        price=relaxation.price,
        cost_unit=cost - relaxation.lower_bound,
    )
    allowed_gap = SHARE_FOR_SOLVER * relative_gap * relaxation.lower_bound
    changes = _solve_within(program, solver, allowed_gap, time_limit_seconds)
    changed = position.copy()
    changed[row[changes.taken]] = column[changes.taken]
    return Closed(
        position=changed if reduced.total_cost(changed) < cost else position,
        lower_bound=max(known.lower_bound, cost + changes.lower_bound - ROUNDING * cost),
        solver=changes.solver,
    )


def _candidates(relaxation: Relaxation, position: np.ndarray, cost: float) -> tuple[np.ndarray, np.ndarray]:
    may_improve = relaxation.bound_through <= cost * (1 + ROUNDING)
    may_improve[np.arange(len(position)), position] = False
    row, column = np.nonzero(may_improve)
    return row, column


def _solve_within(program: ChangeProgram, solver: str, allowed_gap: float, time_limit_seconds: float) -> Changes:
    """Changes that fit the spare bits exactly, with the bound of the untightened program."""
    first = changes = SOLVERS[solver](program, allowed_gap=allowed_gap, time_limit_seconds=time_limit_seconds)
    tightened = program
    for _ in range(MOST_TIGHTENINGS):
        overspent = int(program.extra_bits[changes.taken].sum()) - program.spare_bits
        if overspent <= 0:
            return replace(changes, lower_bound=first.lower_bound)
        tightened = replace(tightened, spare_bits=tightened.spare_bits - overspent)
        changes = SOLVERS[solver](tightened, allowed_gap=allowed_gap, time_limit_seconds=time_limit_seconds)
    return replace(first, taken=first.taken[:0])
