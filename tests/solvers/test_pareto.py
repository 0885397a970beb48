"""One table, many budgets: the same answers as one by one, in the order asked for, never rising."""

from dataclasses import replace

import numpy as np
import pytest

from solvers import InfeasibleBudgetError, pareto, solve
from tests.solvers.helpers import best_cost, random_problem


@pytest.mark.parametrize("kind", [{}, {"with_groups": True, "with_missing": True}], ids=["plain", "groups"])
def test_each_budget_is_solved_as_if_alone(kind):
    for seed in range(5):
        problem = random_problem(seed, fraction=0.0, **kind)
        budgets = [problem.budget_bits + step * 300_000 for step in (3, 0, 5, 1, 3)]
        curve = pareto(problem, budgets)
        for budget_bits, allocation in zip(budgets, curve, strict=True):
            alone = replace(problem, budget_bits=budget_bits)
            assert allocation.size_bits <= budget_bits
            assert allocation.lower_bound <= best_cost(alone) <= allocation.cost
            assert allocation.cost == pytest.approx(solve(alone).cost, rel=1e-6)


def test_more_bits_never_cost_more_not_even_within_the_gap():
    problem = random_problem(4, num_matrices=6, fraction=0.0)
    budgets = [problem.budget_bits + step * 50_000 for step in range(20)]
    costs = [allocation.cost for allocation in pareto(problem, budgets, relative_gap=0.2)]
    assert (np.diff(costs) <= 0).all()
    assert costs[-1] < costs[0]


def test_an_infeasible_budget_among_them_is_an_error():
    problem = random_problem(0, fraction=0.0)
    with pytest.raises(InfeasibleBudgetError) as error:
        pareto(problem, [problem.budget_bits + 10, problem.budget_bits - 1])
    assert error.value.smallest_bits == problem.budget_bits


def test_no_budgets_no_answers():
    assert pareto(random_problem(0), []) == []
