"""Let a bit have a price: the rows fall apart, and any price proves a lower bound.

    sum_i min_j (cost_ij + price * extra_bits_ij) - price * spare_bits <= the best cost, for any price >= 0

The best price is the steepness of the rows' convex hulls where the budget runs out: sorting the
hulls' steps once finds it exactly for every budget, which bisection would only approach.

Reference:
    Sinha and Zoltners 1979, The multiple-choice knapsack problem. Operations Research 27(3).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from solvers.reduction import ReducedProblem

ROUNDING = 8 * float(np.finfo(np.float64).eps)
"""More than the relative error of the few float64 operations behind a bound; every bound gives it away."""


@dataclass(frozen=True, eq=False)
class HullSteps:
    """Every step along the rows' convex hulls, by falling saving per bit.

    Attributes:
        start: int64 [rows], the position where each row's hull begins.
        start_bits: what these need above the smallest size.
        row, position: int64 [steps], the step takes `row` to `position`.
        extra_bits: int64 [steps], what the step needs.
        saving_per_bit: float64 [steps], never rising.
    """

    start: np.ndarray
    start_bits: int
    row: np.ndarray
    position: np.ndarray
    extra_bits: np.ndarray
    saving_per_bit: np.ndarray

    @cached_property
    def cumulative_bits(self) -> np.ndarray:
        """int64 [steps], in use above the smallest size once the step is taken."""
        return self.start_bits + np.cumsum(self.extra_bits)

    def num_fitting(self, spare_bits: int) -> int:
        """How many steps can be taken one after the other before one does not fit."""
        return int(np.searchsorted(self.cumulative_bits, spare_bits, side="right"))


@dataclass(frozen=True, eq=False)
class Relaxation:
    """What the best price of a bit says about one budget.

    Attributes:
        price: cost per bit, >= 0; 0 only where the bits do not run out.
        lower_bound: proven in float64, roundings included.
        bound_through: float64 [rows, positions], no allocation with this position costs less.
    """

    price: float
    lower_bound: float
    bound_through: np.ndarray


def hull_steps(reduced: ReducedProblem) -> HullSteps:
    """Sort the steps of all convex hulls; equal savings stay in row order."""
    rows, positions, bits, savings = [], [], [], []
    table = zip(reduced.cost.tolist(), reduced.extra_bits.tolist(), strict=True)
    for row, (cost, extra_bits) in enumerate(table):
        hull = _lower_hull(cost, extra_bits)
        saving_per_bit = math.inf
        for start, end in pairwise(hull):
            step_bits = extra_bits[end] - extra_bits[start]
            saving_per_bit = min(saving_per_bit, (cost[start] - cost[end]) / step_bits)
            rows.append(row)
            positions.append(end)
            bits.append(step_bits)
            savings.append(saving_per_bit)
    order = np.argsort(-np.array(savings, dtype=np.float64), kind="stable")
    return HullSteps(
        start=np.zeros(len(reduced.cost), dtype=np.int64),
        start_bits=0,
        row=np.array(rows, dtype=np.int64)[order],
        position=np.array(positions, dtype=np.int64)[order],
        extra_bits=np.array(bits, dtype=np.int64)[order],
        saving_per_bit=np.array(savings, dtype=np.float64)[order],
    )


def relax(reduced: ReducedProblem, steps: HullSteps, spare_bits: int) -> Relaxation:
    """Price the bits so that the steps worth more just fit.

    Args:
        spare_bits: the budget above the smallest size, >= 0.
    """
    num_fitting = steps.num_fitting(spare_bits)
    price = float(steps.saving_per_bit[num_fitting]) if num_fitting < len(steps.row) else 0.0
    priced = reduced.cost + price * reduced.extra_bits
    cheapest = priced.min(axis=1)
    with np.errstate(invalid="ignore"):
        rounded_down = priced - cheapest[:, None] - ROUNDING * priced
    reduced_cost = np.where(np.isfinite(priced), np.maximum(rounded_down, 0.0), np.inf)
    lower_bound = _lower_bound(reduced, cheapest, price * spare_bits)
    return Relaxation(price, lower_bound, lower_bound + reduced_cost)


def _lower_bound(reduced: ReducedProblem, cheapest: np.ndarray, spent: float) -> float:
    priced = math.fsum(cheapest)
    unlimited = math.fsum(reduced.cost.min(axis=1))
    return max(priced - spent - ROUNDING * (priced + spent), unlimited - ROUNDING * unlimited, 0.0)


def _lower_hull(cost: list[float], extra_bits: list[int]) -> list[int]:
    hull: list[int] = []
    for point, height in enumerate(cost):
        if math.isinf(height):
            break
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], point, cost, extra_bits):
            hull.pop()
        hull.append(point)
    return hull


def _is_above(left: int, middle: int, right: int, cost: list[float], extra_bits: list[int]) -> bool:
    fall = (cost[left] - cost[middle]) * (extra_bits[right] - extra_bits[left])
    return fall <= (cost[left] - cost[right]) * (extra_bits[middle] - extra_bits[left])
