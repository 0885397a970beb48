"""Cost table + budget -> Plan: one choice a matrix, as good as the budget allows, with a certificate."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.atomic import write_json
from pipeline.budget import Budget, human_bytes
from pipeline.costs import CostTable, full_label
from pipeline.errors import BudgetError, RecipeError
from pipeline.model import Matrix
from quantizers import StorageFormat, quantizer_from_label
from solvers import AllocationProblem, InfeasibleBudgetError, solve

BYTE_BUDGET_ROUNDS = 8
EMBEDDINGS_ADVICE = "--embeddings lloyd5-g64-s6"
SPARE_BYTES_A_MATRIX = 24  # by which the text of another plan for the same model may be longer


@dataclass(frozen=True)
class PlannedWeight:
    """What is planned for one weight: a quantizer's label, its shape [out, in], and its exact size."""

    label: str
    shape: tuple[int, int]
    size_bits: int

    @property
    def format(self) -> StorageFormat:
        """How it will be stored."""
        return quantizer_from_label(self.label).format

    @property
    def bits_per_param(self) -> float:
        """Everything stored over out * in."""
        return self.size_bits / math.prod(self.shape)


@dataclass(frozen=True)
class PlannedMatrix(PlannedWeight):
    """What one matrix gets from the program, with the error that the cost table expects."""

    cost: float


@dataclass(frozen=True)
class PlannedEmbedding(PlannedWeight):
    """What token embeddings or an output head, [tokens, width], are packed with where the recipe asks for it."""


@dataclass(frozen=True)
class Plan:
    """The choice for every matrix, and how good it provably is.

    Attributes:
        matrices: module name -> its part.
        embeddings: module name -> what the recipe says; not counted in the bits below, which are of `matrices`.
        budget: as the user wrote it.
        predicted_cost: sum of the matrices' costs.
        lower_bound: no plan within the budget costs less.
        gap: (predicted_cost - lower_bound) / predicted_cost.
        status, solver: how the answer was found.
    """

    matrices: dict[str, PlannedMatrix]
    budget: str
    predicted_cost: float
    lower_bound: float
    gap: float
    status: str
    solver: str
    embeddings: dict[str, PlannedEmbedding] = field(default_factory=dict)

    @property
    def packed(self) -> dict[str, PlannedWeight]:
        """All that is stored packed, by module."""
        return {**self.matrices, **self.embeddings}

    @property
    def size_bits(self) -> int:
        """Every stored bit of the planned matrices."""
        return sum(matrix.size_bits for matrix in self.matrices.values())

    @property
    def num_params(self) -> int:
        """Parameters of the planned matrices."""
        return sum(matrix.shape[0] * matrix.shape[1] for matrix in self.matrices.values())

    @property
    def bits_per_param(self) -> float:
        """size_bits / num_params"""
        return self.size_bits / self.num_params

    def to_json(self) -> dict[str, Any]:
        """Plain and sorted; no time, no host."""
        facts = asdict(self) | {"size_bits": self.size_bits, "bits_per_param": round(self.bits_per_param, 6)}
        return json.loads(json.dumps(facts, sort_keys=True))

    def write(self, path: Path) -> None:
        """As JSON."""
        write_json(path, self.to_json())

    @staticmethod
    def read(path: Path) -> "Plan":
        """Undo `write`."""
        stored = json.loads(path.read_text())
        stored["matrices"] = {
            name: PlannedMatrix(**{**entry, "shape": tuple(entry["shape"])})
            for name, entry in stored["matrices"].items()
        }
        stored["embeddings"] = {
            name: PlannedEmbedding(**{**entry, "shape": tuple(entry["shape"])})
            for name, entry in stored.get("embeddings", {}).items()
        }
        del stored["size_bits"], stored["bits_per_param"]
        return Plan(**stored)


def offered_choices(matrices: Sequence[Matrix], labels: list[str], overrides: dict[str, str]) -> dict[str, list[str]]:
    """Parameter name -> labels on offer: the override's where a pattern matches, else all whose rank it can have.

    Raises:
        RecipeError: a pattern is malformed or matches nothing, or its rank is above what a matrix can have.
    """
    rank_of = {label: quantizer_from_label(label).format.rank for label in labels}
    names = [matrix.name for matrix in matrices]
    most_rank = {matrix.name: min(matrix.shape) for matrix in matrices}
    offered = {name: [label for label in labels if rank_of[label] <= most_rank[name]] for name in names}
    for pattern, label in overrides.items():
        try:
            matched = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise RecipeError(f"The override pattern {pattern!r} is not a regular expression: {error}.") from None
        if not matched:
            raise RecipeError(
                f"The override {pattern}={label} matches no matrix. Names look like {names[0]}; "
                "`bitsmith inspect MODEL` lists them all."
            )
        full = full_label(label)
        rank = quantizer_from_label(full).format.rank
        for name in matched:
            if rank > most_rank[name]:
                raise RecipeError(
                    f"The override {pattern}={label} has a rank above what {name} can have ({most_rank[name]})."
                )
            offered[name] = [full]
    return offered


def allocate(
    table: CostTable,
    budget_bits: int,
    *,
    budget: str,
    solver: str,
    share_groups: bool,
    embeddings: dict[str, PlannedEmbedding] | None = None,
) -> Plan:
    """Solve the integer program.

    Args:
        budget_bits: for all matrices of the table together.
        share_groups: matrices that read the same input get the same choice (fused kernels want that).
        embeddings: of the plan, see Plan.
    Raises:
        BudgetError: not even the smallest choices fit.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(table.groups):
        groups[group].append(index)
    shared = tuple(tuple(members) for members in groups.values()) if share_groups else ()
    try:
        found = solve(AllocationProblem(table.cost, table.size_bits, budget_bits, shared), solver=solver)
    except InfeasibleBudgetError as error:
        params = int(table.num_params.sum())
        raise BudgetError(
            f"The budget {budget} is {budget_bits / params:.4f} bits per parameter for the compressed matrices, and "
            f"the smallest plan takes {error.smallest_bits / params:.4f} ({human_bytes(error.smallest_bits / 8)}). "
            f"Raise the budget to at least {_rounded_up(error.smallest_bits / params)}bpw, or offer smaller candidates."
        ) from None
    planned = {
        name.removesuffix(".weight"): PlannedMatrix(
            table.choices[choice], shape, int(table.size_bits[row, choice]), float(table.cost[row, choice])
        )
        for row, (name, shape, choice) in enumerate(zip(table.matrices, table.shapes, found.choice, strict=True))
    }
    status = found.status.name.lower()
    return Plan(planned, budget, found.cost, found.lower_bound, found.gap, status, found.solver, embeddings or {})


def allocate_to_budget(
    table: CostTable,
    budget: Budget,
    original_bytes: int,
    folder_bytes: Callable[[Plan], int],
    *,
    solver: str,
    share_groups: bool,
    embeddings: dict[str, PlannedEmbedding] | None = None,
    can_pack_embeddings: bool = False,
) -> Plan:
    """`allocate`, for a budget of any kind.

    What surrounds the matrices in a folder (file headers, configuration) depends a little on the plan, so a
    byte budget is met by solving again with what was over.

    Args:
        original_bytes: of the original's weight files, which "40%" refers to.
        folder_bytes: exact size of the finished folder for a plan.
        can_pack_embeddings: the model has some (for the message where nothing fits).
    Raises:
        BudgetError: no plan fits.
    """
    solved = partial(
        allocate, table, budget=budget.text, solver=solver, share_groups=share_groups, embeddings=embeddings
    )
    limit = budget.limit_bytes(original_bytes)
    if limit is None:
        assert budget.bits_per_param is not None
        return solved(int(budget.bits_per_param * int(table.num_params.sum())))
    smallest = solved(_smallest_bits(table, share_groups))
    around_bytes = folder_bytes(smallest) - -(-smallest.size_bits // 8)
    if folder_bytes(smallest) > limit:
        is_advised = can_pack_embeddings and not embeddings
        enough = folder_bytes(smallest) + SPARE_BYTES_A_MATRIX * (len(table.matrices) + 10)
        raise BudgetError(
            f"The budget {budget.text} is {human_bytes(limit)} for the finished folder, and the smallest plan takes "
            f"{human_bytes(folder_bytes(smallest))}, of which {human_bytes(around_bytes)} are norms, embeddings, head, "
            f"tokenizer and configuration. Raise the budget to {math.ceil(enough / 1000) / 1000:.3f}MB, or offer "
            f"smaller candidates{f', or pack the embeddings ({EMBEDDINGS_ADVICE})' if is_advised else ''}."
        )
    budget_bits = 8 * (limit - around_bytes)
    for _ in range(BYTE_BUDGET_ROUNDS):
        plan = solved(budget_bits)
        over_bytes = folder_bytes(plan) - limit
        if over_bytes <= 0:
            return plan
        budget_bits = plan.size_bits - 8 * over_bytes
        if budget_bits < smallest.size_bits:  # more surrounds this plan than the smallest, which does fit
            budget_bits = (smallest.size_bits + plan.size_bits) // 2
    return smallest


def _smallest_bits(table: CostTable, share_groups: bool) -> int:
    sizes = np.where(np.isfinite(table.cost), table.size_bits, np.iinfo(np.int64).max // 2**20)
    if not share_groups:
        return int(sizes.min(axis=1).sum())
    totals: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(table.choices), dtype=np.int64))
    for group, row in zip(table.groups, sizes, strict=True):
        totals[group] = totals[group] + row
    return int(sum(total.min() for total in totals.values()))


def _rounded_up(value: float) -> float:
    return np.ceil(value * 1000) / 1000
