"""What `solve` promises, on every kind of problem and with every solver."""

import importlib.util
import itertools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import AllocationProblem, InfeasibleBudgetError, Status, solve
from tests.solvers.helpers import ALL_SOLVERS, best_cost, feasible_allocations, random_problem

KINDS = {
    "plain": {},
    "missing": {"with_missing": True},
    "ties": {"with_ties": True},
    "groups": {"with_groups": True},
    "groups-missing": {"with_groups": True, "with_missing": True},
    "groups-ties": {"with_groups": True, "with_ties": True},
    "twelve-decades": {"decades": 12.0},
    "many-choices": {"num_matrices": 3, "num_choices": 12},
    "one-matrix": {"num_matrices": 1},
    "one-choice": {"num_choices": 1},
}


def check(problem, allocation, relative_gap=1e-6):
    """Everything that can be verified without knowing the best cost."""
    rows = np.arange(problem.num_matrices)
    assert allocation.choice.dtype == np.int64
    assert allocation.choice.shape == rows.shape
    assert allocation.size_bits == int(problem.size_bits[rows, allocation.choice].sum()) <= problem.budget_bits
    assert allocation.cost == math.fsum(problem.cost[rows, allocation.choice])
    assert 0 <= allocation.lower_bound <= allocation.cost < np.inf
    assert allocation.gap == pytest.approx(
        1 - allocation.lower_bound / allocation.cost if allocation.cost else 0.0, abs=1e-15
    )
    assert (allocation.status is Status.OPTIMAL) == (allocation.gap <= relative_gap)
    for group in problem.groups:
        assert len(set(allocation.choice[list(group)])) == 1


@pytest.mark.parametrize("solver", ALL_SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_brute_force(kind, solver):
    for seed in range(25 if solver == "highs" else 6):
        problem = random_problem(seed, **KINDS[kind])
        allocation = solve(problem, solver=solver)
        check(problem, allocation)
        assert allocation.status is Status.OPTIMAL
        best = best_cost(problem)
        assert allocation.lower_bound <= best <= allocation.cost <= best * (1 + 1e-6), f"seed {seed}"


def test_the_integer_program_is_needed_and_used():
    solvers = [solve(random_problem(seed)).solver for seed in range(25)]
    assert solvers.count("highs") >= 5
    assert solvers.count("lagrangian") >= 5


@settings(max_examples=40)
@given(st.data())
def test_equals_brute_force_on_small_integers(data):
    num_choices = data.draw(st.integers(1, 4))
    cell = st.tuples(st.integers(0, 9), st.integers(0, 9))
    table = data.draw(st.lists(st.lists(cell, min_size=num_choices, max_size=num_choices), min_size=1, max_size=4))
    cells = np.array(table)
    problem = AllocationProblem(
        cost=cells[..., 0].astype(float), size_bits=cells[..., 1], budget_bits=data.draw(st.integers(0, 40))
    )
    smallest_bits = int(problem.size_bits.min(axis=1).sum())
    if problem.budget_bits < smallest_bits:
        with pytest.raises(InfeasibleBudgetError) as error:
            solve(problem)
        assert error.value.smallest_bits == smallest_bits
    else:
        allocation = solve(problem)
        check(problem, allocation)
        assert allocation.cost == best_cost(problem)


def large_problem(budget_share, *, num_matrices=60, seed=1, decades=0.5):
    """Shaped like a model: costs fall fourfold a bit, sizes are large and share few factors."""
    rng = np.random.default_rng(seed)
    bits = np.array([2.1, 2.3, 2.6, 3.1, 3.4, 4.0, 4.5, 8.2])
    parameters = rng.choice([589_824, 196_608, 884_736], num_matrices)
    size_bits = (parameters[:, None] * bits).astype(np.int64) + rng.integers(0, 999, (num_matrices, len(bits)))
    sensitivity = parameters * 10 ** rng.uniform(-decades, decades, num_matrices)
    cost = sensitivity[:, None] * 4.0**-bits * rng.uniform(0.8, 1.2, size_bits.shape)
    return AllocationProblem(cost, size_bits, int(budget_share * parameters.sum()))


@pytest.mark.parametrize("decades", [0.5, 6.0], ids=["one-decade", "twelve-decades"])
@pytest.mark.parametrize("bits_per_param", [2.2, 2.75, 3.5, 5.0])
def test_highs_and_cbc_agree_on_a_model_sized_problem(bits_per_param, decades):
    problem = large_problem(bits_per_param, decades=decades)
    first, second = (solve(problem, solver=name) for name in ALL_SOLVERS)
    for allocation in (first, second):
        check(problem, allocation)
        assert allocation.status is Status.OPTIMAL
    assert first.cost == pytest.approx(second.cost, rel=1e-6)
    assert first.lower_bound <= second.cost
    assert second.lower_bound <= first.cost


def test_more_bits_never_cost_more_than_the_gap():
    problem = large_problem(2.2, num_matrices=20)
    start = problem.budget_bits
    costs = [solve(replace(problem, budget_bits=start + step * start // 10)).cost for step in range(8)]
    for cost, next_cost in itertools.pairwise(costs):
        assert next_cost <= cost * (1 + 1e-6)


def test_repeated_calls_agree():
    problem = large_problem(2.75)
    first, second = solve(problem), solve(problem)
    assert first.solver == "highs"
    assert first.choice.tolist() == second.choice.tolist()
    assert first.lower_bound == second.lower_bound


def test_equal_choices_break_ties_by_index():
    problem = AllocationProblem(np.full((4, 3), 2.0), np.full((4, 3), 7), 28)
    assert solve(problem).choice.tolist() == [0, 0, 0, 0]


def test_scaling_the_costs_changes_nothing():
    problem = large_problem(2.75, num_matrices=20)
    plain = solve(problem)
    for factor in (2.0**-200, 2.0**200):
        scaled = solve(replace(problem, cost=problem.cost * factor))
        assert scaled.choice.tolist() == plain.choice.tolist()


@pytest.mark.parametrize(("missing_bits", "cost"), [(0, 11.5), (1, 19.0)])
def test_one_bit_in_a_petabit_decides(missing_bits, cost):
    bits = 2**50 + 1
    size_bits = np.array([[1, bits], [1, bits], [2, bits + 2]])
    table = np.array([[9.0, 1.0], [9.0, 1.5], [9.0, 1.0]])
    problem = AllocationProblem(table, size_bits, 2 * bits + 2 - missing_bits)
    for solver in ALL_SOLVERS:
        allocation = solve(problem, solver=solver)
        check(problem, allocation)
        assert allocation.cost == best_cost(problem) == cost


@pytest.mark.parametrize("solver", ALL_SOLVERS)
def test_a_poor_start_is_solved_again_in_finer_units(solver):
    """The greedy start takes the first row's bit, then lacks one for a large row: 500 times the best."""
    table = np.array([[2.0, 0.0], [1000.0, 0.0], [1000.0, 0.0]])
    problem = AllocationProblem(table, np.array([[0, 1], [0, 1000], [0, 1000]]), 2000)
    allocation = solve(problem, solver=solver)
    check(problem, allocation)
    assert allocation.solver == solver
    assert allocation.cost == 2.0
    assert allocation.status is Status.OPTIMAL


@pytest.mark.parametrize("kind", ["plain", "missing", "groups-missing"])
def test_infeasible_names_the_smallest_budget_and_that_one_is_solved(kind):
    problem = random_problem(3, fraction=1.0, **KINDS[kind])
    smallest_bits = min(size for size, _ in feasible_allocations(problem))
    with pytest.raises(InfeasibleBudgetError, match="Raise the budget to at least") as error:
        solve(replace(problem, budget_bits=smallest_bits - 1))
    assert error.value.smallest_bits == smallest_bits
    assert error.value.budget_bits == smallest_bits - 1
    assert solve(replace(problem, budget_bits=smallest_bits)).size_bits == smallest_bits


def test_a_negative_budget_is_infeasible_not_malformed():
    with pytest.raises(InfeasibleBudgetError):
        solve(replace(random_problem(0), budget_bits=-5))


@pytest.mark.parametrize("solver", ALL_SOLVERS)
def test_out_of_time_still_answers_within_the_budget(solver):
    problem = large_problem(2.75, num_matrices=200)
    allocation = solve(problem, solver=solver, relative_gap=1e-7, time_limit_seconds=1e-9)
    check(problem, allocation, relative_gap=1e-7)
    assert allocation.status is Status.FEASIBLE
    assert allocation.gap < 0.01


@pytest.mark.parametrize("solver", ALL_SOLVERS)
def test_a_solver_cut_short_is_not_believed(solver):
    problem = large_problem(2.75, num_matrices=200)
    allocation = solve(problem, solver=solver, relative_gap=1e-7, time_limit_seconds=0.05)
    check(problem, allocation, relative_gap=1e-7)
    assert allocation.gap < 0.01


def test_without_highspy_cbc_answers_and_says_so(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "highspy" else find_spec(name))
    problem = large_problem(2.75, num_matrices=20)
    assert solve(problem).solver == "cbc (highspy is not installed)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "gurobi"}, "expected one of cbc, highs"),
        ({"relative_gap": 0.0}, "relative_gap"),
        ({"relative_gap": float("nan")}, "relative_gap"),
        ({"relative_gap": 1.0}, "relative_gap"),
        ({"time_limit_seconds": 0.0}, "time_limit_seconds"),
        ({"time_limit_seconds": float("inf")}, "time_limit_seconds"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        solve(random_problem(0), **settings)


def test_importing_the_solvers_is_light():
    code = "import sys, solvers; print([name for name in ('torch', 'pulp', 'scipy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
