"""The cost table: what every (matrix, choice) loses, as quantizers/estimate.py estimates it.

The table wants, for each matrix and each choice of quantizer and rank, the weighted error after the decomposition
W ~ Q + L1 L2. Decomposing anew for each entry takes hours.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from pipeline.atomic import write_json
from pipeline.errors import NonFiniteError, RecipeError
from pipeline.model import Matrix, Model
from pipeline.progress import SILENT, Progress
from pipeline.spread import Spread, over_cores
from pipeline.statistics import Statistics
from pipeline.working_memory import costs_bytes
from quantizers import AbstractQuantizer, ErrorEstimator, LayerStatistics, quantizer_from_label

SIGNIFICANT_DIGITS = 6  # costs are rounded before they decide, so that the last bits of a sum do not


@dataclass(frozen=True)
class CostTable:
    """cost[i, c] and size_bits[i, c] of giving choice c to matrix i; cost is inf where c is not on offer.

    Attributes:
        matrices: parameter names.
        groups: group of each matrix.
        shapes: (out, in) of each matrix.
        choices: labels, see quantizers/registered.py.
        cost: float64 [matrices, choices], the estimated weighted error of W - Q - L1 L2.
        size_bits: int64 [matrices, choices], everything stored.
    """

    matrices: tuple[str, ...]
    groups: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    choices: tuple[str, ...]
    cost: np.ndarray
    size_bits: np.ndarray

    @property
    def num_params(self) -> np.ndarray:
        """int64 [matrices]"""
        return np.array([rows * columns for rows, columns in self.shapes], dtype=np.int64)

    def write(self, path: Path) -> None:
        """As JSON; sizes follow from labels and shapes and are not written."""
        rows = [
            {"matrix": name, "group": group, "shape": list(shape), "cost": _costs_to_json(cost)}
            for name, group, shape, cost in zip(self.matrices, self.groups, self.shapes, self.cost, strict=True)
        ]
        write_json(path, {"choices": list(self.choices), "rows": rows})

    @staticmethod
    def read(path: Path) -> "CostTable":
        """Undo `write`."""
        stored = json.loads(path.read_text())
        return _table(
            [(row["matrix"], row["group"], tuple(row["shape"])) for row in stored["rows"]],
            stored["choices"],
            np.array([[np.inf if cost is None else cost for cost in row["cost"]] for row in stored["rows"]]),
        )


def full_label(label: str) -> str:
    """The label with its defaults spelt out: "nf4" -> "nf4-g64-s8".

    Raises:
        RecipeError: there is no such quantizer, or a setting is out of range.
    """
    try:
        return quantizer_from_label(label).format.label
    except ValueError as error:
        raise RecipeError(f"{label!r} cannot be offered: {error}.") from None


def choices_of(candidates: tuple[str, ...], ranks: tuple[int, ...], factor_bits: tuple[int, ...]) -> list[str]:
    """All labels of the table: every candidate without a low-rank part, and with each rank at each width."""
    plain = [full_label(label) for label in candidates]
    parts = [f"-r{rank}-f{bits}" for rank in ranks if rank for bits in factor_bits]
    low_rank = [full_label(label + part) for part in parts for label in plain if "-r" not in label]
    return list(dict.fromkeys(plain + low_rank))


def check_ranks(matrices: tuple[Matrix, ...], ranks: tuple[int, ...]) -> None:
    """Raise RecipeError for a rank that no matrix can have; small matrices are not offered what they cannot have."""
    most = max(min(matrix.shape) for matrix in matrices)
    if ranks and max(ranks) > most:
        raise RecipeError(f"Rank {max(ranks)} is above what any matrix of the model can have. Use {most} at most.")


def measure_costs(
    model: Model,
    statistics: Statistics | None,
    choices: dict[str, list[str]],
    *,
    num_rows: int,
    seed: int,
    work: Path,
    device: str = "cpu",
    spread: Spread = over_cores,
    progress: Progress = SILENT,
) -> None:
    """Measure the table into `work`/out/costs.json; layers already measured are kept over kills.

    Args:
        statistics: None for an unweighted error.
        choices: parameter name -> labels on offer for that matrix.
        num_rows: rows sampled from each matrix; a matrix with fewer is measured whole.
    Raises:
        NonFiniteError: a weight is not finite, or a cost came out so.
    """
    (work / "matrices").mkdir(exist_ok=True)
    task = MeasureRow(model, choices, num_rows, seed, statistics, work / "matrices", device)
    for _ in progress.track(spread(task, model.matrices), "Cost table", total=len(model.matrices)):
        pass
    costs = {matrix.name: json.loads(task.file(matrix).read_text()) for matrix in model.matrices}
    table = cost_table(model.matrices, choices, lambda name, label: costs[name][label])
    if np.isnan(table.cost).any():
        bad = table.matrices[int(np.argwhere(np.isnan(table.cost))[0][0])]
        raise NonFiniteError(f"The cost of {bad} is not a number; its statistics are damaged. Start with --no-resume.")
    (work / "out").mkdir(exist_ok=True)
    table.write(work / "out" / "costs.json")


@dataclass(frozen=True)
class MeasureRow:
    """A pipeline.spread.MatrixTask: the costs of one matrix under each choice, into folder/<name>.json.

    Attributes:
        choices: parameter name -> labels on offer.
        num_rows, seed: see `measure_costs`.
    """

    model: Model
    choices: dict[str, list[str]]
    num_rows: int
    seed: int
    statistics: Statistics | None
    folder: Path
    device: str = "cpu"

    stage: ClassVar[str] = "costs"
    has_small_operations: ClassVar[bool] = False

    def file(self, matrix: Matrix) -> Path:
        """See MatrixTask."""
        return self.folder / f"{matrix.name}.json"

    def make(self, matrix: Matrix) -> None:
        """See MatrixTask."""
        if self.file(matrix).exists():
            return
        weight = self.model.weight(matrix).to(self.device)
        learnt = self.statistics.of(matrix).to(self.device) if self.statistics else None
        offered = {label: quantizer_from_label(label) for label in self.choices[matrix.name]}
        row = measure_matrix(weight, learnt, offered, num_rows=self.num_rows, seed=self.seed)
        write_json(self.file(matrix), row)

    def working_bytes(self, matrix: Matrix) -> int:
        """See MatrixTask."""
        return costs_bytes(matrix.shape, self.statistics.metric if self.statistics else None)

    def settings(self, matrices: Sequence[Matrix]) -> dict[str, Any]:
        """See MatrixTask."""
        choices = {matrix.name: self.choices[matrix.name] for matrix in matrices}
        return {"choices": choices, "num_rows": self.num_rows, "seed": self.seed, "device": self.device}


def cost_table(
    matrices: tuple[Matrix, ...], offered: dict[str, list[str]], cost: Callable[[str, str], float]
) -> CostTable:
    """A table filled by `cost(parameter name, label)`; inf where a label is not on offer."""
    labels = list(dict.fromkeys(label for labels in offered.values() for label in labels))
    costs = [[cost(m.name, label) if label in offered[m.name] else np.inf for label in labels] for m in matrices]
    return _table([(m.name, m.group, m.shape) for m in matrices], labels, np.array(costs))


def measure_matrix(
    weight: Tensor,
    statistics: LayerStatistics | None,
    choices: dict[str, AbstractQuantizer],
    *,
    num_rows: int,
    seed: int,
) -> dict[str, float]:
    """Estimated weighted error of one matrix [out, in] under each choice, by its key."""
    estimator = ErrorEstimator(weight, statistics, num_rows=num_rows, seed=seed)
    return {key: float(f"{estimator.error(choice):.{SIGNIFICANT_DIGITS}g}") for key, choice in choices.items()}


def _table(matrices: list[tuple[str, str, tuple[int, int]]], labels: list[str], cost: np.ndarray) -> CostTable:
    names, groups, shapes = zip(*matrices, strict=True)
    formats = [quantizer_from_label(label).format for label in labels]
    of_shape = {shape: [form.size_bits(shape) for form in formats] for shape in dict.fromkeys(shapes)}
    sizes = np.array([of_shape[shape] for shape in shapes], dtype=np.int64)
    return CostTable(names, groups, shapes, tuple(labels), cost.astype(np.float64), sizes)


def _costs_to_json(cost: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in cost]
