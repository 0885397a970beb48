"""A malformed problem is refused at construction, by name."""

import numpy as np
import pytest

from solvers import AllocationProblem, InfeasibleBudgetError
from tests.solvers.helpers import random_problem

COST = np.array([[3.0, 1.0], [2.0, 1.0], [5.0, 4.0]])
SIZE = np.array([[1, 4], [1, 4], [2, 8]])


def changed(table, cell, value):
    table = table.copy()
    table[cell] = value
    return table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((COST[0], SIZE[0], 9), r"shape \(2,\)"),
        ((COST[:0], SIZE[:0], 9), "at least one of each"),
        ((COST, SIZE[:2], 9), "expected that of `cost`"),
        ((changed(COST, (1, 0), np.nan), SIZE, 9), "nan for matrix 1, choice 0;"),
        ((changed(COST, 0, -1.0), SIZE, 9), r"matrix 0, choice 0 \(and in 1 more places\)"),
        ((changed(COST, (2, 1), -np.inf), SIZE, 9), "-inf for matrix 2, choice 1"),
        ((changed(COST, 2, np.inf), SIZE, 9), "Matrix 2 has no available choice"),
        ((changed(COST, (0, 1), 1e200), SIZE, 9), "1e.200 for matrix 0, choice 1"),
        ((changed(COST, (0, 1), 1e-200), SIZE, 9), "set negligible ones to 0"),
        ((COST, SIZE.astype(float), 9), "expected integers"),
        ((COST, changed(SIZE, (0, 1), -4), 9), "holds -4 for matrix 0, choice 1"),
        ((COST, changed(SIZE, 0, 2**53), 9), "Check the units"),
        ((COST, SIZE, 9.5), "9.5, a float"),
        ((COST, SIZE, True), "a bool"),
        ((COST, SIZE, 9, ((),)), "empty group"),
        ((COST, SIZE, 9, ((0, 3),)), "names matrix 3; expected 0 to 2"),
        ((COST, SIZE, 9, ((-1, 0),)), "names matrix -1"),
        ((COST, SIZE, 9, ((0, 1), (1, 2))), "Matrix 1 is in `groups` twice"),
        ((COST, SIZE, 9, ((0, 0),)), "Matrix 0 is in `groups` twice"),
        (
            (changed(changed(COST, (0, 0), np.inf), (1, 1), np.inf), SIZE, 9, ((0, 1),)),
            "available to all its matrices",
        ),
    ],
)
def test_malformed_problems_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AllocationProblem(*arguments)


def test_the_tables_are_copied_and_read_only():
    cost = COST.copy()
    problem = AllocationProblem(cost, SIZE, np.int64(9))
    cost[0, 0] = 99.0
    assert problem.cost[0, 0] == 3.0
    with pytest.raises(ValueError, match="read-only"):
        problem.size_bits[0, 0] = 0
    assert isinstance(problem.budget_bits, int)


def test_groups_are_the_same_in_any_order():
    problem = AllocationProblem(COST, SIZE, 9, ((2, 1),))
    assert problem.groups == ((1, 2),)


def test_the_infeasible_error_survives_a_process_boundary():
    import pickle

    error = pickle.loads(pickle.dumps(InfeasibleBudgetError(10, 25)))
    assert (error.budget_bits, error.smallest_bits) == (10, 25)
    assert "15 bits below" in str(error)


def test_helpers_make_feasible_problems():
    for seed in range(5):
        assert random_problem(seed, with_groups=True, with_missing=True).budget_bits > 0
