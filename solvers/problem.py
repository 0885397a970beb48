"""The allocation problem and its answer: one choice a matrix, least total cost, within the budget.

    minimise  sum_i cost[i, choice_i]   subject to   sum_i size_bits[i, choice_i] <= budget_bits

also known as the multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger 2004, chapter 11).
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

LARGEST_TOTAL_BITS = 2**53
"""Sizes up to here are exact in float64; 2**53 bits are a petabyte."""
SMALLEST_COST, LARGEST_COST = 1e-150, 1e150
"""Between them the price of a bit can be computed without under- or overflow."""


@dataclass(frozen=True, eq=False)
class AllocationProblem:
    """What every choice would cost, and how much may be stored. Checked once, here; then read-only.

    Args:
        cost: float64 [matrices, choices], weighted error, >= 0; np.inf where a choice is not available.
        size_bits: int64 [matrices, choices], everything that the choice would store, >= 0.
        budget_bits: the most that all matrices together may store.
        groups: matrices (row indices) that must take the same choice; disjoint.
    Raises:
        ValueError: a table is malformed, a group is not a set of rows, or some matrix has no choice at all.
    """

    cost: np.ndarray
    size_bits: np.ndarray
    budget_bits: int
    groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "cost", _checked_cost(self.cost))
        object.__setattr__(self, "size_bits", _checked_size(self.size_bits, self.cost.shape))
        object.__setattr__(self, "budget_bits", _checked_budget(self.budget_bits))
        object.__setattr__(self, "groups", _checked_groups(self.groups, self.cost))

    @property
    def num_matrices(self) -> int:
        return self.cost.shape[0]

    @property
    def num_choices(self) -> int:
        return self.cost.shape[1]


class Status(Enum):
    """How much an allocation's certificate says; the value is the advice."""

    OPTIMAL = "The cost is proven to be within the requested gap of the best possible."
    FEASIBLE = (
        "The time limit was reached first: the allocation fits the budget, and the best possible cost is "
        "not below `lower_bound`. Raise `time_limit_seconds` or accept a larger `relative_gap`."
    )


@dataclass(frozen=True, eq=False)
class Allocation:
    """The choice per matrix and its certificate.

    Attributes:
        choice: int64 [matrices], the column taken in each row.
        cost: the sum of the costs taken, correctly rounded.
        size_bits: the sum of the sizes taken, exact; never above the budget.
        lower_bound: no allocation within the budget costs less than this.
        gap: (cost - lower_bound) / cost, 0 where the cost is 0.
        status: whether `gap` is within the requested one.
        solver: what proved the bound: "lagrangian", "highs" or "cbc", which says so where it stood in.
        seconds: wall time of the call.
    """

    choice: np.ndarray
    cost: float
    size_bits: int
    lower_bound: float
    gap: float
    status: Status
    solver: str
    seconds: float


def _checked_cost(cost: Any) -> np.ndarray:
    table = np.array(cost, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(
            f"`cost` has shape {table.shape}; expected [matrices, choices] with at least one of each. "
            "Give one row a matrix and one column a choice."
        )
    wrong = np.argwhere(np.isnan(table) | (table < 0))
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"`cost` holds {table[row, column]} for matrix {row}, choice {column}"
            f"{_and_more(wrong)}; expected a number >= 0, or inf where the choice is not available. "
            "Check the measurement of that matrix."
        )
    if not np.isfinite(table).any(axis=1).all():
        row = int(np.argmin(np.isfinite(table).any(axis=1)))
        raise ValueError(
            f"Matrix {row} has no available choice: its whole row of `cost` is inf. "
            "Leave the matrix out of the problem, or add a choice that it can take."
        )
    extreme = np.argwhere((table > 0) & np.isfinite(table) & ((table < SMALLEST_COST) | (table > LARGEST_COST)))
    if len(extreme):
        row, column = extreme[0]
        raise ValueError(
            f"`cost` holds {table[row, column]} for matrix {row}, choice {column}"
            f"{_and_more(extreme)}; expected 0 or {SMALLEST_COST} to {LARGEST_COST}. "
            "Multiply all costs by a common factor, or set negligible ones to 0."
        )
    table.setflags(write=False)
    return table


def _checked_size(size_bits: Any, shape: tuple[int, ...]) -> np.ndarray:
    given = np.asarray(size_bits)
    if given.shape != shape:
        raise ValueError(f"`size_bits` has shape {given.shape}; expected that of `cost`, {shape}.")
    if not np.issubdtype(given.dtype, np.integer):
        raise ValueError(
            f"`size_bits` has dtype {given.dtype}; expected integers, since budgets are exact. "
            "Count the stored bits as integers, do not round an average."
        )
    if given.min() < 0:
        row, column = np.argwhere(given < 0)[0]
        raise ValueError(
            f"`size_bits` holds {given[row, column]} for matrix {row}, choice {column}; expected bits >= 0."
        )
    if sum(int(bits) for bits in given.max(axis=1)) >= LARGEST_TOTAL_BITS:
        raise ValueError(
            f"`size_bits` adds up to 2**53 bits or more, a petabyte; the largest entry is {given.max():,}. "
            "Check the units: sizes are bits."
        )
    table = given.astype(np.int64)
    table.setflags(write=False)
    return table


def _checked_budget(budget_bits: Any) -> int:
    if isinstance(budget_bits, bool) or not isinstance(budget_bits, int | np.integer):
        raise ValueError(
            f"`budget_bits` is {budget_bits!r}, a {type(budget_bits).__name__}; expected an integer. "
            "Round the budget down to whole bits first."
        )
    return int(budget_bits)


def _checked_groups(groups: Any, cost: np.ndarray) -> tuple[tuple[int, ...], ...]:
    checked = tuple(tuple(sorted(int(index) for index in group)) for group in groups)
    seen: set[int] = set()
    for group in checked:
        if not group:
            raise ValueError("`groups` holds an empty group; expected indices of matrices. Leave it out.")
        for index in group:
            if not 0 <= index < len(cost):
                raise ValueError(f"Group {group} names matrix {index}; expected 0 to {len(cost) - 1}.")
            if index in seen:
                raise ValueError(f"Matrix {index} is in `groups` twice; expected disjoint groups. Merge them.")
            seen.add(index)
        if not np.isfinite(cost[list(group)]).all(axis=0).any():
            raise ValueError(
                f"Group {group} has no choice that is available to all its matrices. "
                "Split the group, or add a choice that all of them can take."
            )
    return tuple(sorted(checked))


def _and_more(wrong: np.ndarray) -> str:
    return f" (and in {len(wrong) - 1} more places)" if len(wrong) > 1 else ""
