"""Cost table + budget -> Plan: one choice a matrix, as good as the budget allows, with a certificate."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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
AS_STORED = "as stored"  # the label of embeddings that are not packed
SPARE_SHARE = 1e-3  # of a budget in bytes that may be left over, before another plan is looked for
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
    """What token embeddings or an output head, [tokens, width], are packed with, or would be.

    Attributes:
        cost: the divergence that it was measured to cause, in nats a token; None where nothing was measured.
    """

    cost: float | None = None


Offered = Mapping[str, tuple[PlannedEmbedding, ...]]  # module name -> what its embeddings may become


@dataclass(frozen=True)
class Plan:
    """The choice for every matrix, and how good it provably is.

    Attributes:
        matrices: module name -> its part.
        embeddings: module name -> how they are packed; not counted in bits and costs below, which are of `matrices`.
        budget: as the user wrote it.
        predicted_cost: sum of the matrices' costs.
        lower_bound: no plan within the budget, with these embeddings, costs less.
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
    def embeddings_label(self) -> str:
        """How embeddings are packed, in a word or two."""
        return ", ".join(dict.fromkeys(each.label for each in self.embeddings.values())) or "as stored"

    @property
    def expected_cost(self) -> float:
        """Of matrices and embeddings together."""
        return self.predicted_cost + sum(each.cost or 0.0 for each in self.embeddings.values())

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
        """Undo `write`; a checkpoint's plan.json says of other weights, too, why they are skipped."""
        stored = json.loads(path.read_text())
        stored.pop("skipped", None)
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


def check_shared_choices(matrices: Sequence[Matrix], offered: dict[str, list[str]]) -> None:
    """Raise RecipeError where matrices that must agree have nothing to agree on."""
    groups: dict[str, list[str]] = defaultdict(list)
    for matrix in matrices:
        groups[matrix.group].append(matrix.name)
    for group, members in groups.items():
        if not set.intersection(*(set(offered[name]) for name in members)):
            raise RecipeError(
                f"--share-groups wants one choice for {group}, and none is on offer for all of {', '.join(members)}. "
                "Let the overrides match all of them, or none."
            )


def allocate(
    table: CostTable,
    budget_bits: int,
    *,
    budget: str,
    solver: str,
    share_groups: bool,
    embeddings: Offered | None = None,
) -> Plan:
    """Solve the integer program.

    Args:
        budget_bits: for all matrices of the table together, and for embeddings that are free to choose.
        share_groups: matrices that read the same input get the same choice (fused kernels want that).
        embeddings: what is on offer for them. Those with one choice get it, and count nowhere.
    Raises:
        BudgetError: not even the smallest choices fit.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(table.groups):
        groups[group].append(index)
    shared = tuple(tuple(members) for members in groups.values()) if share_groups else ()
    free = free_to_choose(embeddings or {})
    cost, size_bits = _with_rows(table, free)
    try:
        found = solve(AllocationProblem(cost, size_bits, budget_bits, shared), solver=solver)
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
        for row, (name, shape, choice) in enumerate(zip(table.matrices, table.shapes, found.choice, strict=False))
    }
    chosen = {module: choices[0] for module, choices in (embeddings or {}).items()}
    for (module, choices), choice in zip(free.items(), found.choice[len(planned) :], strict=True):
        chosen[module] = choices[choice]
    predicted, least, gap = found.cost, found.lower_bound, found.gap
    if free:
        predicted = math.fsum(matrix.cost for matrix in planned.values())
        least = min(predicted, max(0.0, least - math.fsum(chosen[module].cost or 0.0 for module in free)))
        gap = (predicted - least) / predicted if predicted else 0.0
    packed = {module: each for module, each in chosen.items() if each.label != AS_STORED}
    return Plan(planned, budget, predicted, least, gap, found.status.name.lower(), found.solver, packed)


def free_to_choose(embeddings: Offered) -> Offered:
    """Those with more than one choice."""
    return {module: choices for module, choices in embeddings.items() if len(choices) > 1}


def _with_rows(table: CostTable, free: Offered) -> tuple[np.ndarray, np.ndarray]:
    """The table's cost and size_bits, and below them a row for each of `free`."""
    if not free:
        return table.cost, table.size_bits
    rows = len(table.matrices) + len(free)
    columns = max(len(table.choices), *(len(choices) for choices in free.values()))
    cost, size_bits = np.full((rows, columns), np.inf), np.zeros((rows, columns), dtype=np.int64)
    cost[: len(table.matrices), : len(table.choices)] = table.cost
    size_bits[: len(table.matrices), : len(table.choices)] = table.size_bits
    for row, choices in enumerate(free.values(), start=len(table.matrices)):
        cost[row, : len(choices)] = [each.cost or 0.0 for each in choices]
        size_bits[row, : len(choices)] = [each.size_bits for each in choices]
    return cost, size_bits


def allocate_to_budget(
    table: CostTable,
    budget: Budget,
    original_bytes: int,
    folder_bytes: Callable[[Plan], int],
    *,
    solver: str,
    share_groups: bool,
    embeddings: Offered | None = None,
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
    free = free_to_choose(embeddings or {})
    smallest_bits = smallest_bits_of(table, share_groups)
    smallest_bits += sum(min(each.size_bits for each in choices) for choices in free.values())
    smallest = solved(smallest_bits)
    around_bytes = folder_bytes(smallest) - -(-smallest_bits // 8)
    if folder_bytes(smallest) > limit:
        is_advised = can_pack_embeddings and not embeddings
        enough = folder_bytes(smallest) + SPARE_BYTES_A_MATRIX * (len(table.matrices) + 10)
        raise BudgetError(
            f"The budget {budget.text} is {human_bytes(limit)} for the finished folder, and the smallest plan takes "
            f"{human_bytes(folder_bytes(smallest))}, of which {human_bytes(around_bytes)} are norms, "
            f"{'what is left dense' if free else 'embeddings, head'}, tokenizer and configuration. "
            f"Raise the budget to {math.ceil(enough / 1000) / 1000:.3f}MB, or offer "
            f"smaller candidates{f', or pack the embeddings ({EMBEDDINGS_ADVICE})' if is_advised else ''}."
        )
    best, budget_bits, too_many_bits = smallest, 8 * (limit - around_bytes), 2**62
    for _ in range(BYTE_BUDGET_ROUNDS):
        plan = solved(budget_bits)
        spare_bytes = limit - folder_bytes(plan)
        plan_bits = plan.size_bits + sum(_size_bits(plan, module, choices) for module, choices in free.items())
        next_bits = plan_bits + 8 * spare_bytes
        if spare_bytes >= 0:
            best = min(plan, best, key=lambda each: each.expected_cost)
            if next_bits <= budget_bits or spare_bytes <= SPARE_SHARE * limit:
                break
        else:
            too_many_bits = budget_bits
        if next_bits < smallest_bits:  # more surrounds this plan than the smallest, which does fit
            next_bits = (smallest_bits + plan_bits) // 2
        if next_bits >= too_many_bits:  # as much surrounds another plan
            next_bits = (budget_bits + too_many_bits) // 2
        budget_bits = next_bits
    return best


def _size_bits(plan: Plan, module: str, choices: tuple[PlannedEmbedding, ...]) -> int:
    """Of embeddings that were free to choose."""
    if module in plan.embeddings:
        return plan.embeddings[module].size_bits
    return next(each.size_bits for each in choices if each.label == AS_STORED)


def smallest_bits_of(table: CostTable, share_groups: bool) -> int:
    """Below which no plan for the matrices can be."""
    sizes = np.where(np.isfinite(table.cost), table.size_bits, np.iinfo(np.int64).max // 2**20)
    if not share_groups:
        return int(sizes.min(axis=1).sum())
    totals: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(table.choices), dtype=np.int64))
    for group, row in zip(table.groups, sizes, strict=True):
        totals[group] = totals[group] + row
    return int(sum(total.min() for total in totals.values()))


def _rounded_up(value: float) -> float:
    return np.ceil(value * 1000) / 1000
