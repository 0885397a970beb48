"""The rival of a plan: one choice for all matrices, of the same size.

The integer program believes the cost table. Where a uniform choice of equal bytes comes near the plan in expected
error, both are quantized and measured, and the better one becomes the checkpoint: no plan is worse than a uniform one.
"""

from dataclasses import replace

import numpy as np

from pipeline.allocation import Plan, PlannedMatrix
from pipeline.costs import CostTable

NEAR = 1.25  # a rival whose expected error is more than this many times the plan's is not measured
SAME_SIZE = 0.99  # nor one that takes less of the plan's bits than this


def rival_of(plan: Plan, table: CostTable) -> Plan | None:
    """The uniform choice of least expected error within the plan's size, as a plan.

    None if none comes near, or the plan is uniform itself. Matrices that were not free to choose keep what they have.
    """
    rows = np.arange(len(table.matrices))
    names = [name.removesuffix(".weight") for name in table.matrices]
    chosen = np.array([table.choices.index(plan.matrices[name].label) for name in names])
    free = np.isfinite(table.cost).sum(axis=1) > 1
    best: tuple[float, int] | None = None
    for column in range(len(table.choices)):
        columns = np.where(free, column, chosen)
        cost, size_bits = table.cost[rows, columns].sum(), table.size_bits[rows, columns].sum()
        fits = np.isfinite(cost) and SAME_SIZE * plan.size_bits <= size_bits <= plan.size_bits
        fits = fits and not np.array_equal(columns, chosen)
        if fits and cost <= NEAR * plan.predicted_cost and (best is None or cost < best[0]):
            best = float(cost), column
    if best is None:
        return None
    cost, column = best
    label = table.choices[column]
    matrices = dict(plan.matrices)
    for row, name in enumerate(names):
        if free[row]:
            size_bits, expected = int(table.size_bits[row, column]), float(table.cost[row, column])
            matrices[name] = PlannedMatrix(label, table.shapes[row], size_bits, expected)
    status = f"uniform {label}, measured better than the program's answer"
    gap = (cost - plan.lower_bound) / cost if cost else 0.0
    return replace(plan, matrices=matrices, predicted_cost=cost, gap=gap, status=status)
