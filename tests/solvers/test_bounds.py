"""The Lagrangian bound holds and is tight; the greedy start fits; solvers are checked, not trusted."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import linprog

from solvers import SOLVERS, solve
from solvers.branching import branch
from solvers.greedy import climb, fill
from solvers.lagrangian import hull_steps, relax
from solvers.pulp_milp import Changes
from solvers.reduction import reduce
from tests.solvers.helpers import best_cost, feasible_allocations, random_problem


def linear_relaxation(problem):
    """The same bound from a linear program: fractions of choices allowed."""
    num_cells = problem.cost.size
    rows = np.repeat(np.eye(problem.num_matrices), problem.num_choices, axis=1)
    sizes = problem.size_bits.reshape(1, num_cells) / problem.budget_bits
    return linprog(problem.cost.ravel(), A_ub=sizes, b_ub=[1.0], A_eq=rows, b_eq=np.ones(len(rows))).fun


def test_the_bound_is_that_of_the_linear_program():
    for seed in range(15):
        problem = random_problem(seed)
        reduced = reduce(problem)
        bound = relax(reduced, hull_steps(reduced), problem.budget_bits - reduced.smallest_bits).lower_bound
        assert bound == pytest.approx(linear_relaxation(problem), rel=1e-6)
        assert bound <= best_cost(problem)


def test_reduced_costs_bound_what_a_position_leads_to():
    for seed in range(10):
        problem = random_problem(seed, num_matrices=4)
        reduced = reduce(problem)
        spare_bits = problem.budget_bits - reduced.smallest_bits
        relaxation = relax(reduced, hull_steps(reduced), spare_bits)
        for row, column in np.argwhere(np.isfinite(reduced.cost)):
            forced = problem.cost.copy()
            kept = reduced.choice[row, column]
            forced[row, np.arange(problem.num_choices) != kept] = np.inf
            costs = [
                cost for _, cost in feasible_allocations(type(problem)(forced, problem.size_bits, problem.budget_bits))
            ]
            if costs:
                assert relaxation.bound_through[row, column] <= min(costs)


def test_branching_tightens_the_bound_and_never_cuts_off_a_better_allocation():
    num_tightened = 0
    for seed in range(30):
        problem = random_problem(seed)
        reduced = reduce(problem)
        steps, spare_bits = hull_steps(reduced), problem.budget_bits - reduced.smallest_bits
        start = climb(reduced, steps, spare_bits)
        if reduced.total_cost(start) <= relax(reduced, steps, spare_bits).lower_bound * (1 + 1e-9):
            continue
        branched = branch(reduced, steps, spare_bits, start)
        best = best_cost(problem)
        assert relax(reduced, steps, spare_bits).lower_bound <= branched.relaxation.lower_bound <= best
        assert best <= reduced.total_cost(branched.position) <= reduced.total_cost(start)
        assert reduced.total_extra_bits(branched.position) <= spare_bits
        for size_bits, choice in every_choice(problem):
            cost = math.fsum(problem.cost[range(problem.num_matrices), choice])
            if size_bits <= problem.budget_bits and cost < reduced.total_cost(branched.position):
                position = reduced.locate(np.array(choice))
                if reduced.expand(position).tolist() == list(choice):  # else a dominated choice
                    through = branched.relaxation.bound_through[range(len(position)), position]
                    assert through.max() <= cost
        num_tightened += branched.relaxation.lower_bound > relax(reduced, steps, spare_bits).lower_bound
    assert num_tightened >= 10


def every_choice(problem):
    for choice in itertools.product(range(problem.num_choices), repeat=problem.num_matrices):
        yield int(problem.size_bits[range(problem.num_matrices), choice].sum()), choice


def test_climb_and_fill_stay_within_the_budget_and_fill_never_costs_more():
    for seed in range(30):
        problem = random_problem(seed, num_matrices=6)
        reduced = reduce(problem)
        spare_bits = problem.budget_bits - reduced.smallest_bits
        climbed = climb(reduced, hull_steps(reduced), spare_bits)
        filled = fill(reduced, climbed, spare_bits)
        assert reduced.total_extra_bits(climbed) <= spare_bits
        assert reduced.total_extra_bits(filled) <= spare_bits
        assert reduced.total_cost(filled) <= reduced.total_cost(climbed)


def hard_problem():
    return next(problem for problem in map(random_problem, range(100)) if solve(problem).solver == "highs")


def test_a_solver_that_overspends_is_asked_again_for_less(monkeypatch):
    asked = []

    def overspending(program, **limits):
        asked.append(program.spare_bits)
        if len(asked) == 1:
            return Changes(np.array([np.argmax(program.extra_bits)]), -np.inf, "careless")
        return SOLVERS["cbc"](program, **limits)

    problem = hard_problem()
    monkeypatch.setitem(SOLVERS, "careless", overspending)
    allocation = solve(problem, solver="careless")
    assert allocation.size_bits <= problem.budget_bits
    assert len(asked) == 2
    assert asked[1] < asked[0]
    assert allocation.lower_bound <= best_cost(problem) <= allocation.cost


def test_a_solver_that_always_overspends_costs_nothing(monkeypatch):
    def hopeless(program, **limits):
        return Changes(np.array([np.argmax(program.extra_bits)]), -np.inf, "hopeless")

    problem = hard_problem()
    monkeypatch.setitem(SOLVERS, "hopeless", hopeless)
    allocation = solve(problem, solver="hopeless")
    assert allocation.size_bits <= problem.budget_bits
    assert allocation.lower_bound <= best_cost(problem) <= allocation.cost
