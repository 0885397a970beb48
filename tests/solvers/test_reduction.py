"""Pruning and merging change the problem's size, never its answer."""

import numpy as np
import pytest

from solvers import AllocationProblem
from solvers.reduction import reduce
from tests.solvers.helpers import best_cost, random_problem

KINDS = [{}, {"with_missing": True}, {"with_ties": True}, {"with_groups": True, "with_missing": True}]


@pytest.mark.parametrize("kind", KINDS, ids=["plain", "missing", "ties", "groups-missing"])
def test_pruning_never_changes_the_optimum(kind):
    for seed in range(20):
        problem = random_problem(seed, **kind)
        reduced = reduce(problem)
        pruned = np.full_like(problem.cost, np.inf)
        for row, members in enumerate(reduced.members):
            useful = reduced.choice[row, np.isfinite(reduced.cost[row])]
            for member in members:
                pruned[member, useful] = problem.cost[member, useful]
        after = AllocationProblem(pruned, problem.size_bits, problem.budget_bits, problem.groups)
        assert best_cost(after) == best_cost(problem), f"seed {seed}"


def test_rows_rise_in_size_and_fall_in_cost():
    for seed in range(20):
        reduced = reduce(random_problem(seed, num_choices=9, num_matrices=3))
        for cost, extra_bits in zip(reduced.cost, reduced.extra_bits, strict=True):
            useful = np.isfinite(cost)
            assert (np.diff(cost[useful]) < 0).all()
            assert (np.diff(extra_bits[useful]) > 0).all()
            assert not useful[useful.sum() :].any()


def test_dominated_equal_and_missing_choices_are_dropped():
    cost = [[4.0, 4.0, 5.0, np.inf, 1.0, 1.0]]
    size_bits = [[2, 2, 2, 1, 6, 5]]
    reduced = reduce(AllocationProblem(np.array(cost), np.array(size_bits), 9))
    assert reduced.choice.tolist() == [[0, 5]]
    assert reduced.cost.tolist() == [[4.0, 1.0]]
    assert reduced.extra_bits.tolist() == [[0, 3]]
    assert reduced.smallest_bits == 2


def test_groups_become_one_row_with_the_sums():
    problem = AllocationProblem(
        np.array([[3.0, 1.0], [9.0, 8.0], [2.0, np.inf]]), np.array([[1, 2], [1, 2], [10, 20]]), 99, ((2, 0),)
    )
    reduced = reduce(problem)
    assert reduced.members == ((0, 2), (1,))
    assert reduced.cost.tolist() == [[5.0, np.inf], [9.0, 8.0]]
    assert reduced.smallest_bits == 12


def test_locate_is_the_inverse_of_expand():
    for seed in range(10):
        reduced = reduce(random_problem(seed, with_groups=True, with_missing=True))
        last = np.isfinite(reduced.cost).sum(axis=1) - 1
        for position in (np.zeros_like(last), last):
            assert reduced.locate(reduced.expand(position)).tolist() == position.tolist()
