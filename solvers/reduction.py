"""A smaller problem with the same answer: groups merged into rows, dominated choices dropped.

A choice that is neither smaller nor cheaper than another one of its row is never needed. What is
left of a row is sorted: sizes strictly up, costs strictly down, the first is the smallest.
"""

import math
from dataclasses import dataclass

import numpy as np

from solvers.problem import AllocationProblem


@dataclass(frozen=True, eq=False)
class ReducedProblem:
    """Rows with their useful choices, by increasing size, padded on the right with cost inf.

    Attributes:
        cost: float64 [rows, positions], strictly decreasing along a row, inf in the padding.
        extra_bits: int64 [rows, positions], size above the row's smallest choice; 0 in the padding.
        choice: int64 [rows, positions], column of the problem that the position stands for; 0 in the padding.
        members: the matrices behind each row.
        smallest_bits: the size of the allocation that takes position 0 everywhere.
        num_matrices: how many matrices the members are.
    """

    cost: np.ndarray
    extra_bits: np.ndarray
    choice: np.ndarray
    members: tuple[tuple[int, ...], ...]
    smallest_bits: int
    num_matrices: int

    def expand(self, position: np.ndarray) -> np.ndarray:
        """The problem's choice per matrix, int64 [matrices], for a position per row, int64 [rows]."""
        choice = np.empty(self.num_matrices, dtype=np.int64)
        for row, members in enumerate(self.members):
            choice[list(members)] = self.choice[row, position[row]]
        return choice

    def locate(self, choice: np.ndarray) -> np.ndarray:
        """The inverse of `expand`, for a choice that came from it."""
        wanted = np.array([choice[members[0]] for members in self.members])
        return np.argmax((self.choice == wanted[:, None]) & np.isfinite(self.cost), axis=1)

    def total_cost(self, position: np.ndarray) -> float:
        return math.fsum(self.cost[np.arange(len(position)), position])

    def total_extra_bits(self, position: np.ndarray) -> int:
        return int(self.extra_bits[np.arange(len(position)), position].sum())


def reduce(problem: AllocationProblem) -> ReducedProblem:
    """Merge the groups and drop what is dominated; the optimal cost is unchanged."""
    members, cost, size_bits = _merge_groups(problem)
    order = np.argsort(cost, axis=1, kind="stable")  # ties break by the lower index
    order = np.take_along_axis(
        order, np.argsort(np.take_along_axis(size_bits, order, axis=1), axis=1, kind="stable"), axis=1
    )
    cost = np.take_along_axis(cost, order, axis=1)
    size_bits = np.take_along_axis(size_bits, order, axis=1)

    before = np.minimum.accumulate(cost, axis=1)
    useful = np.isfinite(cost)
    useful[:, 1:] &= cost[:, 1:] < before[:, :-1]

    left = np.argsort(~useful, axis=1, kind="stable")[:, : useful.sum(axis=1).max()]
    useful = np.take_along_axis(useful, left, axis=1)
    size_bits = np.take_along_axis(size_bits, left, axis=1)
    return ReducedProblem(
        cost=np.where(useful, np.take_along_axis(cost, left, axis=1), np.inf),
        extra_bits=np.where(useful, size_bits - size_bits[:, :1], 0),
        choice=np.where(useful, np.take_along_axis(order, left, axis=1), 0),
        members=members,
        smallest_bits=int(size_bits[:, 0].sum()),
        num_matrices=problem.num_matrices,
    )


def _merge_groups(problem: AllocationProblem) -> tuple[tuple[tuple[int, ...], ...], np.ndarray, np.ndarray]:
    grouped = {index for group in problem.groups for index in group}
    alone = tuple((index,) for index in range(problem.num_matrices) if index not in grouped)
    members = tuple(sorted(alone + problem.groups))
    cost = np.stack([_exact_sum(problem.cost[list(rows)]) for rows in members])
    size_bits = np.stack([problem.size_bits[list(rows)].sum(axis=0) for rows in members])
    return members, cost, size_bits


def _exact_sum(rows: np.ndarray) -> np.ndarray:
    return rows[0] if len(rows) == 1 else np.array([math.fsum(column) for column in rows.T])
