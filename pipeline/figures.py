"""The figures behind the report, as plain JSON: the page, the pictures and the model card only show them.

Equal facts give equal figures: no time, no host, no path of this machine.
"""

import math
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.allocation import Plan
from pipeline.command import compress_command, pinned
from pipeline.costs import CostTable
from pipeline.model import Matrix, Model
from pipeline.origin import model_name, read_origin
from pipeline.recovery_report import RecoveryReport
from pipeline.task import auto_class
from solvers import AllocationProblem, pareto

FORMAT_VERSION = 1
NUM_CURVE_BUDGETS = 15
CURVE_GAP = 1e-4  # relative; nobody sees less in a picture
SIGNIFICANT_DIGITS = 9


@dataclass(frozen=True)
class ReportFacts:
    """What a report tells of.

    Attributes:
        model: the original.
        errors: module -> weighted error that the decomposition achieved, in the unit of the plan's costs.
        recipe: as in recipe.json.
        size_bytes: of the finished folder.
        checkpoint_digest: of its artifact.
        evaluation: None if there was none; else {"report": EvalReport.to_json(), "prompt": str,
            "samples": {"original": str, "compressed": str}, "text": source, "text_commit": str | None}. Samples
            are None where they would have taken too long: of a model that is not in memory as a whole.
        recovery: None if there was none.
        rival: see Results.comparison.
        notes: what the statistics do not tell, a sentence each.
    """

    model: Model
    plan: Plan
    table: CostTable
    errors: dict[str, float]
    recipe: dict[str, Any]
    size_bytes: int
    checkpoint_digest: str
    evaluation: dict[str, Any] | None
    recovery: RecoveryReport | None = None
    rival: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeatMap:
    """Bits per parameter, bits[type][layer]; None where a layer has no matrix of the type."""

    types: tuple[str, ...]
    layers: tuple[int, ...]
    bits: tuple[tuple[float | None, ...], ...]


def figures(facts: ReportFacts) -> dict[str, Any]:
    """report.json: everything that the page, the pictures and the card show."""
    model, plan, recipe = facts.model, facts.plan, facts.recipe
    origin = read_origin(model.spec, model.revision, model.path)
    architectures = getattr(model.config, "architectures", None) or [type(model.config).__name__]
    return _rounded(
        {
            "format_version": FORMAT_VERSION,
            "name": model_name(model.spec, origin.base_model),
            "origin": asdict(origin),
            "architecture": architectures[0],
            "auto_class": auto_class(model.config).__name__,
            "num_params": model.num_params,
            "num_matrix_params": plan.num_params,
            "num_matrices": len(plan.matrices),
            "budget": plan.budget,
            "bits_per_param": plan.bits_per_param,
            "sizes": sizes(facts),
            "heat_map": asdict(heat_map(model.matrices, plan)),
            "choices": choices(plan),
            "layers": costs_of_layers(facts),
            "curve": budget_curve(facts.table, plan, recipe),
            "certificate": {
                "predicted_cost": plan.predicted_cost,
                "embeddings_cost": plan.expected_cost - plan.predicted_cost,
                "achieved_cost": math.fsum(facts.errors.values()),
                "rank_correlation": rank_correlation(facts),
                "lower_bound": plan.lower_bound,
                "gap": plan.gap,
                "status": plan.status,
                "solver": plan.solver,
            },
            "rival": facts.rival,
            "notes": list(facts.notes),
            "embeddings": embeddings(plan),
            "skipped": skipped(model, plan),
            "recipe": recipe,
            "command": compress_command(recipe | pinned(recipe, facts.evaluation)),
            "checkpoint_digest": facts.checkpoint_digest,
            "evaluation": facts.evaluation,
            "recovery": facts.recovery.to_json() if facts.recovery else None,
        }
    )


def sizes(facts: ReportFacts) -> dict[str, dict[str, int]]:
    """Bytes before and after, by part; `folder` is the sum of the others."""
    model, plan = facts.model, facts.plan
    matrices = sum(model.tensors[matrix.name].size_bytes for matrix in model.matrices)
    tables = sum(model.tensors[f"{module}.weight"].size_bytes for module in plan.embeddings)
    kept = model.size_bytes - matrices - tables
    around = model.folder_bytes - model.size_bytes
    after, packed = plan.size_bits // 8, sum(each.size_bits for each in plan.embeddings.values()) // 8
    return {
        "matrices": {"original": matrices, "compressed": after},
        "embeddings": {"original": tables, "compressed": packed},
        "kept": {"original": kept, "compressed": kept},
        "around": {"original": around, "compressed": facts.size_bytes - after - packed - kept},
        "folder": {"original": matrices + tables + kept + around, "compressed": facts.size_bytes},
    }


def embeddings(plan: Plan) -> list[dict[str, Any]]:
    """What embeddings and head are packed with, where they are."""
    return [
        {
            "module": module,
            "label": each.label,
            "meaning": meaning(each.label),
            "bits_per_param": each.bits_per_param,
            "cost": each.cost,
        }
        for module, each in plan.embeddings.items()
    ]


def matrix_types(matrices: tuple[Matrix, ...]) -> dict[str, str]:
    """Module -> its type: `q_proj`, or as much of the path in the block as tells it from others of that name.

    Numbers inside the path (experts) become `*`.
    """
    paths = {matrix.module: _path_in_block(matrix) for matrix in matrices}
    paths_of_kind = defaultdict(set)
    for matrix in matrices:
        paths_of_kind[matrix.kind].add(paths[matrix.module])
    return {m.module: m.kind if len(paths_of_kind[m.kind]) == 1 else paths[m.module] for m in matrices}


def heat_map(matrices: tuple[Matrix, ...], plan: Plan) -> HeatMap:
    """Bits per parameter by layer and type; experts of a layer are averaged."""
    types = matrix_types(matrices)
    sums: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    for matrix in matrices:
        cell = sums[types[matrix.module], matrix.layer]
        cell[0] += plan.matrices[matrix.module].size_bits
        cell[1] += matrix.num_params
    layers = sorted({matrix.layer for matrix in matrices})
    rows = tuple(dict.fromkeys(types.values()))
    bits = tuple(
        tuple(sums[row, layer][0] / sums[row, layer][1] if (row, layer) in sums else None for layer in layers)
        for row in rows
    )
    return HeatMap(rows, tuple(layers), bits)


def choices(plan: Plan) -> list[dict[str, Any]]:
    """What was chosen how often, the smallest first."""
    taken = defaultdict(list)
    for matrix in plan.matrices.values():
        taken[matrix.label].append(matrix)
    rows = []
    for label, matrices in taken.items():
        num_params = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
        size_bits = sum(matrix.size_bits for matrix in matrices)
        rows.append(
            {
                "label": label,
                "meaning": meaning(label),
                "num_matrices": len(matrices),
                "num_params": num_params,
                "share": num_params / plan.num_params,
                "bits_per_param": size_bits / num_params,
            }
        )
    return sorted(rows, key=lambda row: (row["bits_per_param"], row["label"]))


def meaning(label: str) -> str:
    """A label in words."""
    from quantizers import quantizer_from_label

    form = quantizer_from_label(label).format
    return form.meaning + f", low-rank part of rank {form.rank}" * bool(form.rank)


def costs_of_layers(facts: ReportFacts) -> list[dict[str, Any]]:
    """Predicted and achieved error of each layer."""
    predicted, achieved = defaultdict(list), defaultdict(list)
    for matrix in facts.model.matrices:
        predicted[matrix.layer].append(facts.plan.matrices[matrix.module].cost)
        achieved[matrix.layer].append(facts.errors[matrix.module])
    return [
        {"layer": layer, "predicted": math.fsum(predicted[layer]), "achieved": math.fsum(achieved[layer])}
        for layer in sorted(predicted)
    ]


def rank_correlation(facts: ReportFacts) -> float | None:
    """Spearman's, of the matrices' predicted and achieved errors; None where one of both is the same for all."""
    from scipy.stats import spearmanr  # takes a second

    predicted = [matrix.cost for matrix in facts.plan.matrices.values()]
    achieved = [facts.errors[module] for module in facts.plan.matrices]
    if min(predicted) == max(predicted) or min(achieved) == max(achieved):
        return None
    return float(spearmanr(predicted, achieved).statistic)


def budget_curve(table: CostTable, plan: Plan, recipe: dict[str, Any]) -> dict[str, Any]:
    """Predicted cost over bits per parameter: `mixed` is what the program makes of each budget.

    `uniform` gives every matrix that is free to choose the same choice; `best` marks those which no smaller
    one beats. The curve ends where more bits would no longer lower the predicted cost.
    """
    num_params = int(table.num_params.sum())
    cost, size_bits = _merged(table, bool(recipe.get("share_groups")))
    small = np.where(np.isfinite(cost), size_bits, np.iinfo(np.int64).max)
    best = np.where(cost == cost.min(axis=1, keepdims=True), small, np.iinfo(np.int64).max)
    uniform = _uniform(table.choices, cost, size_bits)
    smallest, largest = int(small.min(axis=1).sum()), int(best.min(axis=1).sum())
    budgets = _spread(smallest, largest, [point["size_bits"] for point in uniform if point["best"]])
    problem = AllocationProblem(cost, size_bits, budgets[-1])
    answers = pareto(problem, budgets, solver=recipe.get("solver", "highs"), relative_gap=CURVE_GAP)
    mixed = [{"bits_per_param": answer.size_bits / num_params, "cost": answer.cost} for answer in answers]
    return {
        "mixed": [point for i, point in enumerate(mixed) if point not in mixed[:i]],
        "uniform": [point | {"bits_per_param": point["size_bits"] / num_params} for point in uniform],
        "plan": {"bits_per_param": plan.bits_per_param, "cost": plan.predicted_cost},
    }


def skipped(model: Model, plan: Plan) -> list[dict[str, Any]]:
    """What stays as it is, by reason, the largest first; numbers in names become `*`."""
    by_reason = defaultdict(list)
    packed = {f"{module}.weight" for module in plan.embeddings}
    packed |= {name for name, source in model.ties.items() if source in packed}
    for entry in model.skipped:
        if entry.name in packed:
            continue
        by_reason[entry.reason].append(entry)
    rows = []
    for reason, entries in by_reason.items():
        patterns = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", entry.name) for entry in entries))
        size_bytes = sum(entry.size_bytes for entry in entries)
        rows.append({"reason": reason, "num_tensors": len(entries), "size_bytes": size_bytes, "names": patterns})
    return sorted(rows, key=lambda row: (-row["size_bytes"], row["reason"]))


def _path_in_block(matrix: Matrix) -> str:
    parts = matrix.module.split(".")
    start = parts.index(str(matrix.layer)) + 1 if str(matrix.layer) in parts else 0
    return ".".join("*" if part.isdigit() else part for part in parts[start:])


def _merged(table: CostTable, share_groups: bool) -> tuple[np.ndarray, np.ndarray]:
    """Costs and sizes with one row for all that must take the same choice."""
    if not share_groups:
        return table.cost, table.size_bits
    groups = list(dict.fromkeys(table.groups))
    rows = [groups.index(group) for group in table.groups]
    cost = np.zeros((len(groups), len(table.choices)))
    size_bits = np.zeros(cost.shape, dtype=np.int64)
    np.add.at(cost, rows, table.cost)
    np.add.at(size_bits, rows, table.size_bits)
    return cost, size_bits


def _spread(smallest: int, largest: int, also: list[int]) -> list[int]:
    """Budgets from the smallest to the largest, denser below where a bit matters more, and `also`."""
    budgets = np.geomspace(smallest, largest, NUM_CURVE_BUDGETS).round().astype(np.int64)
    budgets[0], budgets[-1] = smallest, largest
    within = {size for size in also if smallest <= size <= largest}
    return sorted({int(budget) for budget in budgets} | within)


def _uniform(labels: tuple[str, ...], cost: np.ndarray, size_bits: np.ndarray) -> list[dict[str, Any]]:
    offered = np.isfinite(cost)
    fixed = offered.sum(axis=1) == 1
    points: list[dict[str, Any]] = []
    for column, label in enumerate(labels):
        if fixed.all() or not offered[~fixed, column].all():
            continue
        taken = np.where(fixed, offered.argmax(axis=1), column)[:, None]
        points.append(
            {
                "label": label,
                "size_bits": int(np.take_along_axis(size_bits, taken, axis=1).sum()),
                "cost": math.fsum(np.take_along_axis(cost, taken, axis=1)[:, 0]),
            }
        )
    points.sort(key=lambda point: (point["size_bits"], point["cost"], point["label"]))
    lowest = math.inf
    for point in points:
        point["best"] = point["cost"] < lowest
        lowest = min(lowest, point["cost"])
    return points


def _rounded(value: Any) -> Any:
    """Floats to 9 digits: the last bits of a sum are noise."""
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list | tuple) else value
