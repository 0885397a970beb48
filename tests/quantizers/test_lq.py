"""The low-rank part never does harm, does good where there is something to gain, and is stored in 16 bits."""

import pytest
import torch

from quantizers import AbstractQuantizer, LayerStatistics, LloydMax, LowRankPlus, NormalFloat, weighted_error
from quantizers.lq import fit_low_rank
from tests.quantizers.helpers import (
    PLAIN_QUANTIZERS,
    normal_weight,
    quantizer_id,
    statistics_of,
    uneven_statistics,
)

SHAPE = (24, 72)
weighting = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "fisher"])


def statistics_for(weighted: bool, seed: int = 0) -> LayerStatistics | None:
    return uneven_statistics(SHAPE, seed) if weighted else None


def error_of(quantizer: AbstractQuantizer, weight: torch.Tensor, statistics: LayerStatistics | None) -> float:
    return weighted_error(weight - quantizer.quantize(weight, statistics).dequantize(), statistics)


@weighting
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("quantizer", PLAIN_QUANTIZERS, ids=quantizer_id)
def test_the_error_is_never_above_the_one_without(quantizer: AbstractQuantizer, rank: int, weighted: bool) -> None:
    weight, statistics = normal_weight(SHAPE, seed=rank), statistics_for(weighted, seed=rank)
    assert error_of(LowRankPlus(quantizer, rank), weight, statistics) <= error_of(quantizer, weight, statistics)


@weighting
@pytest.mark.parametrize(
    "quantizer", [NormalFloat(2), LloydMax(2), LloydMax(3), NormalFloat(2, scale="absmax")], ids=quantizer_id
)
def test_a_planted_low_rank_part_is_found(quantizer: AbstractQuantizer, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    planted = torch.randn(24, 2, generator=generator) @ torch.randn(2, 72, generator=generator)
    weight, statistics = normal_weight(SHAPE) + planted, statistics_for(weighted)
    alone = error_of(quantizer, weight, statistics)
    assert error_of(LowRankPlus(quantizer, 2, max_iterations=20), weight, statistics) < 0.5 * alone


@weighting
def test_more_iterations_never_cost_more(weighted: bool) -> None:
    weight, statistics = normal_weight(SHAPE), statistics_for(weighted)
    errors = [error_of(LowRankPlus(LloydMax(2), 4, max_iterations=num), weight, statistics) for num in (1, 2, 3, 5, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


@weighting
def test_more_rank_costs_less_error(weighted: bool) -> None:
    weight, statistics = normal_weight(SHAPE), statistics_for(weighted)
    errors = [error_of(LloydMax(2), weight, statistics)]
    errors += [error_of(LowRankPlus(LloydMax(2), rank), weight, statistics) for rank in (1, 4, 12, 24)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0]  # full rank: only the rounding of the factors is left


@weighting
def test_a_low_rank_residual_is_recovered_up_to_rounding(weighted: bool) -> None:
    residual = normal_weight((24, 3)) @ normal_weight((3, 72), 1)
    found = fit_low_rank(residual, statistics_for(weighted), 3).product()
    assert float((found - residual).norm()) < 2**-7 * float(residual.norm())  # bfloat16 has 8 bits


@weighting
def test_a_matrix_on_the_levels_needs_no_correction(weighted: bool) -> None:
    codes = torch.randint(0, 16, SHAPE, generator=torch.Generator().manual_seed(0))
    codes[:, ::8] = 15  # every block holds its largest level
    weight = NormalFloat(4).format.levels[codes]
    quantized = LowRankPlus(NormalFloat(4, 16, scale="absmax"), 2).quantize(weight, statistics_for(weighted))
    assert torch.equal(quantized.dequantize(), weight)
    assert quantized.low_rank is not None
    assert (quantized.low_rank.product() == 0).all()


def test_the_factors_are_stored_in_bfloat16() -> None:
    quantized = LowRankPlus(LloydMax(2), 4).quantize(normal_weight(SHAPE))
    assert quantized.low_rank is not None
    assert {tensor.dtype for tensor in quantized.low_rank.tensors.values()} == {torch.bfloat16}
    assert quantized.low_rank.factors().out.shape == (24, 4)
    assert quantized.low_rank.factors().into.shape == (4, 72)
    assert quantized.format.rank == 4
    assert quantized.size_bits == LloydMax(2).size_bits(SHAPE) + 16 * 4 * (24 + 72)


def test_zero_fisher_gives_finite_factors() -> None:
    fisher = uneven_statistics(SHAPE).fisher_diag.clone()
    fisher[:12], fisher[:, ::2] = 0, 0
    for statistics in (statistics_of(fisher), statistics_of(torch.zeros(SHAPE))):
        low_rank = fit_low_rank(normal_weight(SHAPE), statistics, 4)
        assert torch.isfinite(low_rank.product()).all()
        assert low_rank.product().abs().max() > 0


@pytest.mark.parametrize("factor", [1e-20, 1e-10, 1e10])
def test_the_unit_of_the_fisher_does_not_matter(factor: float) -> None:
    weight, statistics = normal_weight(SHAPE), uneven_statistics(SHAPE)
    rescaled = statistics_of(statistics.fisher_diag * factor)
    ours = LowRankPlus(LloydMax(2), 4).quantize(weight, statistics).dequantize()
    theirs = LowRankPlus(LloydMax(2), 4).quantize(weight, rescaled).dequantize()
    assert weighted_error(weight - theirs, statistics) == pytest.approx(
        weighted_error(weight - ours, statistics), rel=0.02
    )


@pytest.mark.parametrize("weight", [normal_weight(SHAPE), torch.zeros(SHAPE)], ids=["normal", "zeros"])
def test_a_rank_above_the_matrix_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"rank 25 .*\(24, 72\).* 1 to 24"):
        LowRankPlus(LloydMax(2), 25).quantize(weight)


def test_settings_are_checked_at_construction() -> None:
    with pytest.raises(ValueError, match="rank is 0"):
        LowRankPlus(LloydMax(2), 0)
    with pytest.raises(ValueError, match="max_iterations is 0"):
        LowRankPlus(LloydMax(2), 4, max_iterations=0)
    with pytest.raises(ValueError, match="low-rank part already"):
        LowRankPlus(LowRankPlus(LloydMax(2), 4), 4)
