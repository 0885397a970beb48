"""The rival of a plan: one choice for all matrices, as large as the budget allows.

The integer program believes the cost table. Where a uniform choice comes near the plan in expected error, both are
quantized and measured, and the better one becomes the checkpoint: so no plan is worse than uniform quantization.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipeline.allocation import Plan, PlannedMatrix
from pipeline.costs import CostTable

NEAR = 1.25  # a rival whose expected error is more than this many times the plan's is not measured


@dataclass(frozen=True)
class Comparison:
    """Measured KL divergence of the plan and of its rival, in nats a token on the evaluation windows."""

    rival: str
    plan_kl: float
    rival_kl: float

    @property
    def rival_won(self) -> bool:
        """Is the uniform choice the better one?"""
        return self.rival_kl < self.plan_kl

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self) | {"rival_won": self.rival_won}

    @staticmethod
    def from_json(stored: dict[str, Any]) -> "Comparison":
        """Undo `to_json`."""
        return Comparison(stored["rival"], stored["plan_kl"], stored["rival_kl"])


def rival_of(plan: Plan, table: CostTable) -> tuple[str, Plan] | None:
    """The best uniform choice within the plan's size, as a plan; None if none comes near, or the plan is uniform itself.

    Matrices that were not free to choose keep what they have.
    """
    rows = np.arange(len(table.matrices))
    chosen = np.array([table.choices.index(matrix.label) for matrix in plan.matrices.values()])
    free = np.isfinite(table.cost).sum(axis=1) > 1
    best: tuple[float, int] | None = None
    for column in range(len(table.choices)):
        columns = np.where(free, column, chosen)
        cost, size_bits = table.cost[rows, columns].sum(), table.size_bits[rows, columns].sum()
        fits = np.isfinite(cost) and size_bits <= plan.size_bits and not np.array_equal(columns, chosen)
        if fits and cost <= NEAR * plan.predicted_cost and (best is None or cost < best[0]):
            best = float(cost), column
    if best is None:
        return None
    cost, column = best
    matrices = {
        name: PlannedMatrix(
            table.choices[column], matrix.shape, int(table.size_bits[row, column]), float(table.cost[row, column])
        )
        if free[row]
        else matrix
        for row, (name, matrix) in enumerate(plan.matrices.items())
    }
    label = table.choices[column]
    return label, replace(plan, matrices=matrices, predicted_cost=cost, status=f"uniform {label}, measured better")
