"""A uniform choice that is measured to be better takes the plan's place."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.allocation import allocate
from pipeline.compress import compress
from pipeline.costs import CostTable
from pipeline.model import open_model
from pipeline.recipe import Recipe
from pipeline.rival import NEAR, rival_of
from quantizers import AbstractQuantizer, ErrorEstimator, quantizer_from_label
from registry import Registry
from tests.pipeline.small import SMALL

LABELS = ("lloyd2-g32-s4", "lloyd3-g32-s4", "lloyd4-g32-s4")
SHAPE = (32, 64)

pytestmark = pytest.mark.usefixtures("quick")
SIZES = [quantizer_from_label(label).size_bits(SHAPE) for label in LABELS]


def table_of(*costs: tuple[float, ...]) -> CostTable:
    names = tuple(f"m{row}.weight" for row in range(len(costs)))
    sizes = np.array([SIZES] * len(costs), dtype=np.int64)
    return CostTable(names, names, (SHAPE,) * len(costs), LABELS, np.array(costs), sizes)


def plan_of(table: CostTable, bits: int):
    return allocate(table, bits, budget="test", solver="highs", share_groups=False)


def test_the_rival_is_the_best_uniform_choice_that_fits() -> None:
    table = table_of((1.0, 0.51, 0.0), (1.0, 0.51, 0.0))
    plan = plan_of(table, 2 * SIZES[1])
    assert {matrix.label for matrix in plan.matrices.values()} == {LABELS[0], LABELS[2]}
    rival = rival_of(plan, table)
    assert rival is not None
    assert {matrix.label for matrix in rival.matrices.values()} == {LABELS[1]}
    assert rival.predicted_cost == pytest.approx(1.02)
    assert rival.gap == pytest.approx((1.02 - plan.lower_bound) / 1.02)
    assert rival.size_bits == 2 * SIZES[1] <= plan.size_bits
    assert "lloyd3-g32-s4" in rival.status


def test_no_rival_where_none_comes_near_or_the_plan_is_uniform() -> None:
    far = (1.0, 0.51 * NEAR, 0.0)
    assert rival_of(plan_of(table_of(far, far), 2 * SIZES[1]), table_of(far, far)) is None
    same = table_of((1.0, 0.3, 0.0), (1.0, 0.3, 0.0))
    assert rival_of(plan_of(same, 2 * SIZES[1]), same) is None


def test_a_matrix_that_is_not_free_keeps_its_choice() -> None:
    table = table_of((1.0, 0.51, 0.0), (1.0, 0.51, 0.0), (np.inf, np.inf, 0.2))
    rival = rival_of(plan_of(table, 2 * SIZES[1] + SIZES[2]), table)
    assert rival is not None
    assert rival.matrices["m2"].label == LABELS[2]


@pytest.mark.parametrize("misled", [True, False])
def test_compress_keeps_the_better_one_and_says_so(
    misled: bool, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promised = {2: 1.0, 3: 0.51, 4: 0.0}
    if misled:  # a table by which half of the weights at 2 bits and half at 4 beat 3 bits for all

        def error(self: ErrorEstimator, quantizer: AbstractQuantizer) -> float:
            return self.weight.numel() * promised[quantizer.format.bits]

        monkeypatch.setattr(ErrorEstimator, "error", error)
    matrices = open_model(str(tiny_model_dir)).matrices
    size_bits = sum(quantizer_from_label(LABELS[1]).size_bits(matrix.shape) for matrix in matrices)
    budget = size_bits / sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices) + 1e-4
    recipe = Recipe.of(
        model=str(tiny_model_dir),
        **(SMALL | {"budget": f"{budget:.5f}bpw", "ranks": (0,), "candidates": LABELS, "sensitivity": "fisher"}),
    )
    done = compress(recipe, Registry(tmp_path / "registry"), tmp_path / "out")
    labels = {matrix.label for matrix in done.plan.matrices.values()}
    status = json.loads((tmp_path / "out" / "plan.json").read_text())["status"]
    if misled:
        assert labels == {"lloyd3-g32-s4"}
        assert status.startswith("uniform lloyd3-g32-s4")
        assert "not the program" in (tmp_path / "out" / "report" / "index.html").read_text()
        content = json.loads((tmp_path / "out" / "report" / "report.json").read_text())["rival"]
        assert content["rival"] == "uniform lloyd3-g32-s4"
        assert content["rival_kl"] < content["plan_kl"]
        assert done.evaluation is not None
        assert content["rival_kl"] == pytest.approx(done.evaluation.kl_divergence.mean, rel=1e-6)
        assert "both were decomposed and measured" in (tmp_path / "out" / "report" / "index.html").read_text()
    else:
        assert status == "optimal"
