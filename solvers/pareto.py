"""Many budgets from one table: the curve of cost over size.

The table is reduced and its hulls are sorted once for all budgets; each budget starts from the answer
to the next smaller one, so that more bits never cost more.
"""

import time
from collections.abc import Sequence

from solvers.allocation import Effort, allocate, prepare
from solvers.problem import Allocation, AllocationProblem


def pareto(
    problem: AllocationProblem,
    budgets_bits: Sequence[int],
    *,
    solver: str = "highs",
    relative_gap: float = 1e-6,
    time_limit_seconds: float = 60.0,
) -> list[Allocation]:
    """Solve the problem for each of `budgets_bits` in place of its own budget.

    Args:
        problem: its `budget_bits` is not looked at.
        budgets_bits: in any order; the answers come in the same order.
        solver, relative_gap, time_limit_seconds: as for `solve`, the time for each budget.
    Raises:
        InfeasibleBudgetError: nothing fits the smallest of the budgets; raised before any is solved.
        ValueError: the solver is unknown, or a number is out of range.
    """
    effort = Effort(solver, relative_gap, time_limit_seconds)
    prepared = prepare(problem)
    answers: dict[int, Allocation] = {}
    known = None
    for budget_bits in sorted({int(budget) for budget in budgets_bits}):
        known = allocate(prepared, budget_bits, effort, started=time.perf_counter(), known=known)
        answers[budget_bits] = known
    return [answers[int(budget)] for budget in budgets_bits]
