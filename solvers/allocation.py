"""The front door: `solve(problem)` finds the cheapest choices within the budget, with a certificate.

Merge groups and prune; price the bits for a proven bound and a first answer; if the gap is too wide,
fix what cannot improve and give the rest to an integer program; check its answer in exact integers.
"""

import math
import time
from dataclasses import dataclass

import numpy as np

from solvers.branching import branch
from solvers.closing import Closed, close_gap
from solvers.errors import InfeasibleBudgetError
from solvers.greedy import climb, fill
from solvers.lagrangian import HullSteps, hull_steps, relax
from solvers.problem import Allocation, AllocationProblem, Status
from solvers.pulp_milp import SOLVERS
from solvers.reduction import ReducedProblem, reduce

__all__ = ["SOLVERS", "Allocation", "AllocationProblem", "InfeasibleBudgetError", "Status", "solve"]

SMALLEST_RELATIVE_GAP = 1e-7


@dataclass(frozen=True)
class Effort:
    """How hard to try: see `solve`.

    Raises:
        ValueError: the solver is unknown, or a number is out of range.
    """

    solver: str = "highs"
    relative_gap: float = 1e-6
    time_limit_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"Solver {self.solver!r} is unknown; expected one of {', '.join(sorted(SOLVERS))}.")
        if not SMALLEST_RELATIVE_GAP <= self.relative_gap < 1:
            raise ValueError(
                f"`relative_gap` is {self.relative_gap}; expected a number below 1, and at least "
                f"{SMALLEST_RELATIVE_GAP}, the least that floating-point solvers can prove."
            )
        if not 0 < self.time_limit_seconds < math.inf:
            raise ValueError(f"`time_limit_seconds` is {self.time_limit_seconds}; expected a finite number above 0.")


@dataclass(frozen=True, eq=False)
class Prepared:
    """What does not depend on the budget, worked out once."""

    problem: AllocationProblem
    reduced: ReducedProblem
    steps: HullSteps


def solve(
    problem: AllocationProblem,
    *,
    solver: str = "highs",
    relative_gap: float = 1e-6,
    time_limit_seconds: float = 60.0,
) -> Allocation:
    """Minimise the total cost within the budget. The same problem has the same answer, unless time runs out.

    Args:
        problem: the tables, the budget and the groups.
        solver: what closes the last gap, a key of `SOLVERS`; not called where the Lagrangian bound suffices.
        relative_gap: be content once (cost - lower bound) / cost is proven to be at most this.
        time_limit_seconds: then return the best allocation found, with status FEASIBLE.
    Raises:
        InfeasibleBudgetError: nothing fits the budget; names the smallest budget that works.
        ValueError: the solver is unknown, or a number is out of range.
    """
    started = time.perf_counter()
    effort = Effort(solver, relative_gap, time_limit_seconds)
    return allocate(prepare(problem), problem.budget_bits, effort, started=started)


def prepare(problem: AllocationProblem) -> Prepared:
    """Reduce the problem and sort its hulls, for any number of budgets."""
    reduced = reduce(problem)
    return Prepared(problem, reduced, hull_steps(reduced))


def allocate(
    prepared: Prepared,
    budget_bits: int,
    effort: Effort,
    *,
    started: float,
    known: Allocation | None = None,
) -> Allocation:
    """Answer one budget, never worse than `known`, an allocation that fits it.

    Args:
        started: when the caller's clock, `time.perf_counter`, began to run.
    """
    reduced = prepared.reduced
    spare_bits = budget_bits - reduced.smallest_bits
    if spare_bits < 0:
        raise InfeasibleBudgetError(budget_bits, reduced.smallest_bits)
    answer = _search(prepared, spare_bits, effort, started, known)
    choice = reduced.expand(fill(reduced, answer.position, spare_bits))
    cost, size_bits = _recount(prepared.problem, choice, budget_bits)
    lower_bound = min(answer.lower_bound, cost)
    gap = _gap(cost, lower_bound)
    return Allocation(
        choice=choice,
        cost=cost,
        size_bits=size_bits,
        lower_bound=lower_bound,
        gap=gap,
        status=Status.OPTIMAL if gap <= effort.relative_gap else Status.FEASIBLE,
        solver=answer.solver,
        seconds=time.perf_counter() - started,
    )


def _search(prepared: Prepared, spare_bits: int, effort: Effort, started: float, known: Allocation | None) -> Closed:
    reduced, steps = prepared.reduced, prepared.steps
    relaxation = relax(reduced, steps, spare_bits)
    position = fill(reduced, climb(reduced, steps, spare_bits), spare_bits)
    if known is not None:
        improved = fill(reduced, reduced.locate(known.choice), spare_bits)
        position = min(position, improved, key=reduced.total_cost)

    def is_wide(answer: Closed) -> bool:
        return _gap(reduced.total_cost(answer.position), answer.lower_bound) > effort.relative_gap

    answer = Closed(position, relaxation.lower_bound, "lagrangian")
    if not is_wide(answer):
        return answer
    branched = branch(reduced, steps, spare_bits, position)
    answer = Closed(branched.position, branched.relaxation.lower_bound, "lagrangian")
    while is_wide(answer):
        seconds_left = effort.time_limit_seconds - (time.perf_counter() - started)
        if seconds_left <= 0:
            break
        before = answer
        answer = close_gap(
            reduced,
            branched.relaxation,
            before,
            spare_bits,
            solver=effort.solver,
            relative_gap=effort.relative_gap,
            time_limit_seconds=seconds_left,
        )
        if answer.position is before.position:  # else once more, in units of the smaller gap
            break
    return answer


def _recount(problem: AllocationProblem, choice: np.ndarray, budget_bits: int) -> tuple[float, int]:
    """Cost and size of the choice from the caller's own tables, whatever happened on the way."""
    rows = np.arange(problem.num_matrices)
    cost = math.fsum(problem.cost[rows, choice])
    size_bits = sum(problem.size_bits[rows, choice].tolist())
    is_grouped = all(len(set(choice[list(group)].tolist())) == 1 for group in problem.groups)
    if size_bits > budget_bits or not math.isfinite(cost) or not is_grouped:
        raise AssertionError(
            f"The allocation found is not valid: {size_bits:,} of {budget_bits:,} bits, cost {cost}, "
            f"groups {'kept' if is_grouped else 'broken'}. This is a bug in the solver; please report it."
        )
    return cost, size_bits


def _gap(cost: float, lower_bound: float) -> float:
    return (cost - lower_bound) / cost if cost > 0 else 0.0
