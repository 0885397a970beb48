"""The figures behind the report: the right cells, sums that add up, a curve that is a frontier."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.allocation import Plan, PlannedMatrix
from pipeline.figures import (
    ReportFacts,
    budget_curve,
    choices,
    costs_of_layers,
    figures,
    heat_map,
    matrix_types,
    rank_correlation,
    sizes,
    skipped,
)
from pipeline.model import Matrix, open_model
from tests.pipeline.report_facts import made_up_facts, made_up_table


@pytest.fixture(scope="module")
def facts(tiny_model_dir: Path) -> ReportFacts:
    return made_up_facts(tiny_model_dir)


def _matrix(module: str, layer: int, shape: tuple[int, int] = (8, 64)) -> Matrix:
    kind = module.rpartition(".")[2]
    return Matrix(f"{module}.weight", module, shape, False, "F32", layer, kind, module)


def _plan(bits: dict[str, int]) -> Plan:
    matrices = {name: PlannedMatrix("lloyd3-g64-s4", (8, 64), size_bits, 1.0) for name, size_bits in bits.items()}
    return Plan(matrices, "3bpw", 1.0, 1.0, 0.0, "optimal", "highs")


def test_heat_map_has_each_matrix_in_its_cell(facts: ReportFacts) -> None:
    shown = heat_map(facts.model.matrices, facts.plan)
    assert shown.types == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert shown.layers == (0, 1)
    for matrix in facts.model.matrices:
        cell = shown.bits[shown.types.index(matrix.kind)][shown.layers.index(matrix.layer)]
        assert cell == facts.plan.matrices[matrix.module].bits_per_param


def test_heat_map_averages_experts_and_leaves_gaps() -> None:
    matrices = (
        _matrix("model.layers.0.mlp.down_proj", 0),
        _matrix("model.layers.1.mlp.experts.0.up_proj", 1),
        _matrix("model.layers.1.mlp.experts.1.up_proj", 1),
    )
    plan = _plan(dict(zip((m.module for m in matrices), (1024, 1024, 2048), strict=True)))
    shown = heat_map(matrices, plan)
    assert shown.types == ("down_proj", "up_proj")
    assert shown.bits == ((2.0, None), (None, 3.0))


def test_types_of_one_name_are_told_apart(tiny_gpt2_dir: Path) -> None:
    types = matrix_types(open_model(str(tiny_gpt2_dir)).matrices)
    assert set(types.values()) == {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"}


def test_choices_and_layers_add_up(facts: ReportFacts) -> None:
    rows = choices(facts.plan)
    assert sum(row["num_params"] for row in rows) == facts.plan.num_params
    assert sum(row["num_matrices"] for row in rows) == len(facts.plan.matrices)
    assert math.fsum(row["share"] for row in rows) == pytest.approx(1)
    layers = costs_of_layers(facts)
    assert [row["layer"] for row in layers] == [0, 1]
    assert math.fsum(row["predicted"] for row in layers) == pytest.approx(facts.plan.predicted_cost)
    assert all(row["achieved"] == pytest.approx(1.05 * row["predicted"]) for row in layers)
    assert rank_correlation(facts) == pytest.approx(1)
    reversed_errors = {module: -error for module, error in facts.errors.items()}
    assert rank_correlation(replace(facts, errors=reversed_errors)) == pytest.approx(-1)
    assert rank_correlation(replace(facts, errors=dict.fromkeys(facts.errors, 1.0))) is None


def test_sizes_add_up_to_the_folder(facts: ReportFacts) -> None:
    parts = sizes(facts)
    for side in ("original", "compressed"):
        assert sum(parts[key][side] for key in ("matrices", "kept", "around")) == parts["folder"][side]
    assert parts["folder"]["compressed"] == facts.size_bytes
    assert parts["matrices"]["original"] == 2 * facts.model.num_matrix_params  # bfloat16


def test_curve_is_a_frontier_below_every_uniform_choice(facts: ReportFacts) -> None:
    curve = budget_curve(facts.table, facts.plan, facts.recipe)
    sizes_, costs = zip(*((point["bits_per_param"], point["cost"]) for point in curve["mixed"]), strict=True)
    assert len(sizes_) >= 10
    assert list(sizes_) == sorted(set(sizes_))
    assert list(costs) == sorted(set(costs), reverse=True)
    smallest = facts.table.size_bits.min(axis=1).sum() / facts.table.num_params.sum()
    assert sizes_[0] == pytest.approx(smallest)
    assert costs[-1] == pytest.approx(facts.table.cost.min(axis=1).sum())
    for point in curve["uniform"]:
        reached = min(cost for size, cost in zip(sizes_, costs, strict=True) if size <= point["bits_per_param"])
        assert reached <= point["cost"] * (1 + 1e-4)
    assert len(curve["uniform"]) == len(facts.table.choices)
    assert curve["plan"] == {"bits_per_param": facts.plan.bits_per_param, "cost": facts.plan.predicted_cost}


def test_best_uniform_choices_get_cheaper_with_size(facts: ReportFacts) -> None:
    best = [p for p in budget_curve(facts.table, facts.plan, facts.recipe)["uniform"] if p["best"]]
    assert len(best) >= 3
    assert [p["cost"] for p in best] == sorted({p["cost"] for p in best}, reverse=True)


def test_curve_with_an_override_and_shared_groups(facts: ReportFacts) -> None:
    table = made_up_table(facts.model)
    cost = table.cost.copy()
    cost[-1, 1:] = np.inf  # the last matrix, alone in its group, has one choice only
    curve = budget_curve(replace(table, cost=cost), facts.plan, {"share_groups": True})
    by_label = {point["label"]: point for point in curve["uniform"]}
    assert by_label.keys() == set(table.choices)
    column = table.choices.index("lloyd4-g32-s4")
    wanted = table.cost[:-1, column].sum() + table.cost[-1, 0]
    assert by_label["lloyd4-g32-s4"]["cost"] == pytest.approx(wanted)
    free = budget_curve(replace(table, cost=cost), facts.plan, {"share_groups": False})
    assert len(free["mixed"]) >= 10
    assert curve["mixed"][-1]["cost"] == pytest.approx(free["mixed"][-1]["cost"])


def test_skipped_is_grouped_by_reason(facts: ReportFacts) -> None:
    rows = {row["reason"]: row for row in skipped(facts.model, facts.plan)}
    assert rows["norm"]["num_tensors"] == 5
    assert "model.layers.*.input_layernorm.weight" in rows["norm"]["names"]
    assert len(rows["norm"]["names"]) == 3
    kept = facts.model.size_bytes - sum(facts.model.tensors[m.name].size_bytes for m in facts.model.matrices)
    assert sum(row["size_bytes"] for row in rows.values()) == kept


def test_no_path_of_this_machine_is_inside(facts: ReportFacts) -> None:
    assert str(facts.model.path.parent) not in str(figures(replace(facts, model=replace(facts.model, spec="tiny"))))
