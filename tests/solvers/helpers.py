"""Small allocation problems of every kind, and the exhaustive answer to each."""

import itertools
import math

import numpy as np

from solvers import AllocationProblem

ALL_SOLVERS = ["highs", "cbc"]


def random_problem(
    seed: int,
    *,
    num_matrices: int = 5,
    num_choices: int = 4,
    fraction: float | None = None,
    with_missing: bool = False,
    with_ties: bool = False,
    with_groups: bool = False,
    decades: float = 2.0,
) -> AllocationProblem:
    """A feasible problem with its budget at `fraction` of the way from the smallest to the largest size."""
    rng = np.random.default_rng(seed)
    shape = (num_matrices, num_choices)
    if with_ties:
        cost, size_bits = rng.integers(0, 4, shape).astype(float), rng.integers(0, 4, shape)
    else:
        cost = 10.0 ** rng.uniform(-decades, 0, shape)
        size_bits = rng.integers(1, 10**6, shape)
    if with_missing:
        missing = rng.random(shape) < 0.3
        missing[:, 0] = False
        cost[missing] = np.inf
    groups: tuple[tuple[int, ...], ...] = ()
    if with_groups:
        order = rng.permutation(num_matrices).tolist()
        groups = (tuple(order[:2]), tuple(order[2:4]))
    generous = AllocationProblem(cost, size_bits, int(size_bits.sum()), groups)
    sizes = [size for size, _ in feasible_allocations(generous)]
    share = float(rng.random()) if fraction is None else fraction
    budget_bits = min(sizes) + int(share * (max(sizes) - min(sizes)))
    return AllocationProblem(cost, size_bits, budget_bits, groups)


def feasible_allocations(problem: AllocationProblem) -> list[tuple[int, float]]:
    """Size and cost of every allocation that keeps the groups and the budget."""
    alone = [(row,) for row in range(problem.num_matrices) if all(row not in group for group in problem.groups)]
    units = [*alone, *problem.groups]
    found = []
    for columns in itertools.product(range(problem.num_choices), repeat=len(units)):
        taken = [(row, column) for unit, column in zip(units, columns, strict=True) for row in unit]
        size_bits = sum(int(problem.size_bits[cell]) for cell in taken)
        cost = math.fsum(problem.cost[cell] for cell in taken)
        if size_bits <= problem.budget_bits and math.isfinite(cost):
            found.append((size_bits, cost))
    return found


def best_cost(problem: AllocationProblem) -> float:
    return min(cost for _, cost in feasible_allocations(problem))
