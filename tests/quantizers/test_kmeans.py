"""Levels of a matrix's own: never worse than Lloyd-Max's, and those of the matrix where it has few values."""

import pytest
import torch

from quantizers import KMeans, LayerStatistics, LloydMax, weighted_error
from tests.quantizers.helpers import normal_weight, uneven_statistics
from tests.quantizers.test_feedback import correlated


@pytest.mark.parametrize("kind", ["plain", "fisher", "input"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learned_levels_never_lose_to_lloyd_max(bits: int, kind: str) -> None:
    shape = (24, 130)
    statistics = {
        "plain": None,
        "fisher": uneven_statistics(shape),
        "input": LayerStatistics(input_curvature=correlated(130)),
    }[kind]
    for weight in (normal_weight(shape), normal_weight(shape).pow(3), normal_weight(shape).abs()):
        learned, fixed = (
            weighted_error(weight - quantizer.quantize(weight, statistics).dequantize(), statistics)
            for quantizer in (KMeans(bits, 32), LloydMax(bits, 32))
        )
        assert learned < 1.01 * fixed


def test_levels_find_the_values_that_a_matrix_has() -> None:
    values = torch.tensor([-1.0, -0.25, 0.5, 0.75])
    weight = values[torch.randint(0, 4, (32, 64), generator=torch.Generator().manual_seed(0))]
    quantized = KMeans(2, max_iterations=30).quantize(weight)
    fixed = LloydMax(2).quantize(weight)
    assert weighted_error(weight - quantized.dequantize(), None) < 0.1 * weighted_error(
        weight - fixed.dequantize(), None
    )


def test_levels_are_ascending_and_reach_one() -> None:
    for weight in (normal_weight((16, 64)), torch.zeros(4, 64), torch.full((4, 64), 0.3)):
        levels = KMeans(3).quantize(weight).plain["weight_levels"].float()
        assert (levels.diff() >= 0).all()
        assert float(levels.abs().max()) == 1


def test_at_least_one_iteration_is_asked_for() -> None:
    with pytest.raises(ValueError, match="max_iterations is 0"):
        KMeans(3, max_iterations=0)
