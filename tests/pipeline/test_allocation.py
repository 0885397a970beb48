from pathlib import Path

import pytest

from pipeline.allocation import Plan, allocate, allocate_to_budget, check_shared_choices, offered_choices
from pipeline.budget import Budget
from pipeline.costs import CostTable, cost_table
from pipeline.errors import BudgetError, RecipeError
from pipeline.model import open_model
from quantizers import quantizer_from_label

LABELS = ["lloyd2-g32-s4", "lloyd3-g32-s4", "lloyd4-g32-s4", "lloyd3-g32-s4-r2"]


@pytest.fixture(scope="module")
def table(tiny_model_dir: Path) -> CostTable:
    matrices = open_model(str(tiny_model_dir)).matrices
    weight = {matrix.name: 1 + index for index, matrix in enumerate(matrices)}
    return cost_table(
        matrices,
        {matrix.name: LABELS for matrix in matrices},
        cost=lambda name, label: weight[name] * 4.0 ** -quantizer_from_label(label).format.bits,
    )


def plan_for(table: CostTable, bits_per_param: float, *, share_groups: bool = False) -> Plan:
    bits = int(bits_per_param * table.num_params.sum())
    return allocate(table, bits, budget=f"{bits_per_param}bpw", solver="highs", share_groups=share_groups)


@pytest.mark.parametrize("bits_per_param", [2.3, 2.7, 3.0, 3.8, 5.0])
def test_a_plan_keeps_its_budget_and_is_certified(table: CostTable, bits_per_param: float) -> None:
    plan = plan_for(table, bits_per_param)
    assert plan.bits_per_param <= bits_per_param
    assert plan.size_bits == sum(matrix.format.size_bits(matrix.shape) for matrix in plan.matrices.values())
    assert plan.lower_bound <= plan.predicted_cost
    assert plan.gap <= 1e-6
    assert len(plan.matrices) == len(table.matrices)


def test_groups_share_a_choice_on_request(table: CostTable) -> None:
    plan = plan_for(table, 3.0, share_groups=True)
    for group in set(table.groups):
        members = [
            name.removesuffix(".weight") for name, of in zip(table.matrices, table.groups, strict=True) if of == group
        ]
        assert len({plan.matrices[module].label for module in members}) == 1
    assert plan.predicted_cost >= plan_for(table, 3.0).predicted_cost


@pytest.mark.parametrize("share_groups", [False, True])
def test_an_infeasible_budget_names_the_smallest(table: CostTable, share_groups: bool) -> None:
    with pytest.raises(BudgetError, match=r"2\.0000 bits.*at least (\d\.\d+)bpw") as error:
        plan_for(table, 2.0, share_groups=share_groups)
    smallest = float(str(error.value).split("at least ")[1].split("bpw")[0])
    assert plan_for(table, smallest, share_groups=share_groups).bits_per_param <= smallest


def test_byte_budgets_are_met_exactly(table: CostTable) -> None:
    def folder_bytes(plan: Plan) -> int:  # a folder whose other files depend on the plan
        return 5000 + plan.size_bits // 8 + sum(len(matrix.label) for matrix in plan.matrices.values())

    smallest = folder_bytes(plan_for(table, 2.3))
    for limit in (smallest + 500, smallest + 2000, smallest + 5000):
        plan = allocate_to_budget(
            table, Budget.parse(f"{limit}B"), 10**6, folder_bytes, solver="highs", share_groups=False
        )
        assert folder_bytes(plan) <= limit
        assert folder_bytes(plan) > limit - 3000
    with pytest.raises(BudgetError, match=r"Raise the budget to [\d.]+MB"):
        allocate_to_budget(table, Budget.parse("1%"), 10**4, folder_bytes, solver="highs", share_groups=False)


def test_plan_round_trip(table: CostTable, tmp_path: Path) -> None:
    plan = plan_for(table, 3.0)
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan


def test_overrides(tiny_model_dir: Path) -> None:
    matrices = open_model(str(tiny_model_dir)).matrices
    offered = offered_choices(matrices, LABELS, {"0.mlp.down": "nf4"})
    for matrix in matrices:
        assert offered[matrix.name] == (["nf4-g64-s8"] if "0.mlp.down" in matrix.name else LABELS)
    with pytest.raises(RecipeError, match=r"matches no matrix.*layers\.0\."):
        offered_choices(matrices, LABELS, {"up_projection": "nf4"})
    with pytest.raises(RecipeError, match="not a regular expression"):
        offered_choices(matrices, LABELS, {"(": "nf4"})
    with pytest.raises(RecipeError, match="cannot be offered"):
        offered_choices(matrices, LABELS, {"down": "q4"})


def test_groups_that_an_override_divides_are_told(tiny_model_dir: Path) -> None:
    matrices = open_model(str(tiny_model_dir)).matrices
    labels = ["lloyd2-g32-s4", "lloyd4-g32-s4"]
    check_shared_choices(matrices, offered_choices(matrices, labels, {"down_proj": "nf4-g64-s8"}))
    with pytest.raises(RecipeError, match=r"one choice for .*q_proj\+k_proj\+v_proj, and none is on offer for all of"):
        check_shared_choices(matrices, offered_choices(matrices, labels, {"layers.1.*q_proj": "nf4-g64-s8"}))


def test_a_small_matrix_is_not_offered_a_rank_that_it_cannot_have(tiny_model_dir: Path) -> None:
    matrices = open_model(str(tiny_model_dir)).matrices
    offered = offered_choices(matrices, ["nf4-g64-s8", "nf4-g64-s8-r40-f8"], {})
    assert {min(matrix.shape) >= 40 for matrix in matrices} == {True, False}
    for matrix in matrices:
        assert len(offered[matrix.name]) == 1 + (min(matrix.shape) >= 40)
    with pytest.raises(RecipeError, match=r"k_proj=nf4-r40 has a rank above what .*k_proj.* can have \(32\)"):
        offered_choices(matrices, ["nf4-g64-s8"], {"k_proj": "nf4-r40"})


def test_byte_budget_is_met_where_low_rank_parts_take_headers(table: CostTable) -> None:
    def folder_bytes(plan: Plan) -> int:
        return 5000 + -(-plan.size_bits // 8) + 2000 * sum("-r" in matrix.label for matrix in plan.matrices.values())

    smallest = folder_bytes(plan_for(table, 2.3))
    sizes = []
    for limit in (smallest + 300, smallest + 2500, smallest + 9000):
        plan = allocate_to_budget(
            table, Budget.parse(f"{limit}B"), 10**6, folder_bytes, solver="highs", share_groups=False
        )
        sizes.append(folder_bytes(plan))
        assert sizes[-1] <= limit
    assert sizes[0] < sizes[1] < sizes[2]
