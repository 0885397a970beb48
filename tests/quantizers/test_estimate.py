"""Estimates against what quantizing really loses."""

import pytest
import torch

from quantizers import (
    QUANTIZERS,
    AbstractQuantizer,
    ErrorEstimator,
    Integer,
    KMeans,
    LatticeCoded,
    LayerStatistics,
    LloydMax,
    LowRankPlus,
    NormalFloat,
    TrellisCoded,
    VariableTrellis,
    quantizer_from_label,
    weighted_error,
)
from quantizers.estimate import sample_rows
from tests.quantizers.helpers import normal_weight, quantizer_id, uneven_statistics
from tests.quantizers.test_feedback import correlated

BLOCK_QUANTIZERS: list[AbstractQuantizer] = [NormalFloat(4), LloydMax(3, 32, 4), Integer(3, 32, 4), KMeans(2)]
ROTATED_QUANTIZERS: list[AbstractQuantizer] = [
    TrellisCoded(2),
    VariableTrellis(2.5),
    *(LatticeCoded(bits) for bits in (2, 3, 4)),
]


def statistics_of(kind: str, shape: tuple[int, int]) -> LayerStatistics | None:
    if kind == "plain":
        return None
    if kind == "fisher":
        return uneven_statistics(shape)
    outputs = correlated(shape[0], 5, 0.9) if kind == "kronecker" else None
    return LayerStatistics(input_curvature=correlated(shape[1]), output_curvature=outputs)


def ratio(
    quantizer: AbstractQuantizer, shape: tuple[int, int], kind: str, num_rows: int = 10**6, seed: int = 0
) -> float:
    """The estimate over what is really lost."""
    weight, statistics = normal_weight(shape, 3), statistics_of(kind, shape)
    actual = weighted_error(weight - quantizer.quantize(weight, statistics).dequantize(), statistics)
    return ErrorEstimator(weight, statistics, num_rows=num_rows, seed=seed).error(quantizer) / actual


@pytest.mark.parametrize("kind", ["plain", "fisher"])
@pytest.mark.parametrize("quantizer", BLOCK_QUANTIZERS, ids=quantizer_id)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (17, 97), (32, 576)], ids=str)
def test_whole_matrices_are_measured_exactly(quantizer: AbstractQuantizer, shape: tuple[int, int], kind: str) -> None:
    if shape == (1, 1):
        weight = normal_weight(shape)
        assert ErrorEstimator(weight, None, num_rows=4, seed=0).error(quantizer) < 1e-6 * float(weight.square())
    else:
        assert ratio(quantizer, shape, kind) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("kind", ["plain", "fisher"])
@pytest.mark.parametrize("quantizer", BLOCK_QUANTIZERS, ids=quantizer_id)
def test_a_sample_of_rows_is_off_by_a_tenth_at_most(quantizer: AbstractQuantizer, kind: str) -> None:
    assert ratio(quantizer, (256, 97), kind, num_rows=48) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", ["input", "kronecker"])
@pytest.mark.parametrize("quantizer", BLOCK_QUANTIZERS, ids=quantizer_id)
def test_feedback_is_foreseen_without_being_run(quantizer: AbstractQuantizer, kind: str) -> None:
    """Less closely between rows as well, where errors of 2 bits make targets a good deal larger than the weight."""
    assert ratio(quantizer, (96, 192), kind) == pytest.approx(1, abs=0.15 if kind == "input" else 0.3)


@pytest.mark.parametrize("kind", ["plain", "input", "kronecker"])
@pytest.mark.parametrize("quantizer", ROTATED_QUANTIZERS, ids=quantizer_id)
def test_a_rotated_weight_loses_its_distortion(quantizer: AbstractQuantizer, kind: str) -> None:
    """Less closely under feedback: it makes targets larger than the weight, by more in some places than in others."""
    assert ratio(quantizer, (96, 192), kind) == pytest.approx(1, abs=0.1 if kind == "plain" else 0.35)


@pytest.mark.parametrize("quantizer", ROTATED_QUANTIZERS, ids=quantizer_id)
def test_a_fisher_diagonal_meets_rotated_errors_on_average(quantizer: AbstractQuantizer) -> None:
    assert ratio(quantizer, (96, 192), "fisher") == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize("kind", ["plain", "input", "kronecker"])
@pytest.mark.parametrize("plain", [LloydMax(2, 32), LatticeCoded(2)], ids=quantizer_id)
def test_a_low_rank_part_is_foreseen(plain: AbstractQuantizer, kind: str) -> None:
    quantizer = LowRankPlus(plain, 8, max_iterations=1)
    assert ratio(quantizer, (96, 192), kind) == pytest.approx(1, abs=0.35)
    weight, statistics = normal_weight((96, 192)), statistics_of(kind, (96, 192))
    estimator = ErrorEstimator(weight, statistics, num_rows=10**6, seed=0)
    coarse = LowRankPlus(plain, 8, 4)
    assert estimator.error(quantizer) < estimator.error(coarse) < estimator.error(plain)
    assert estimator.error(LowRankPlus(plain, 16)) < estimator.error(quantizer)


@pytest.mark.parametrize("plain", [LloydMax(2, 32), LatticeCoded(2)], ids=quantizer_id)
def test_one_strong_direction_of_the_input_is_worth_a_rank(plain: AbstractQuantizer) -> None:
    """What is rounded last has nobody left to make up for it, and the strong direction runs through all columns."""
    weight, strong = normal_weight((96, 192)), torch.randn(192, generator=torch.Generator().manual_seed(1))
    statistics = LayerStatistics(input_curvature=0.05 * torch.eye(192) + torch.outer(strong, strong))
    estimator = ErrorEstimator(weight, statistics, num_rows=10**6, seed=0)
    one = LowRankPlus(plain, 1, 8)
    losses = [weighted_error(weight - q.quantize(weight, statistics).dequantize(), statistics) for q in (one, plain)]
    assert estimator.error(one) / estimator.error(plain) == pytest.approx(losses[0] / losses[1], abs=0.2)
    assert losses[0] < 0.98 * losses[1]


def test_more_bits_are_expected_to_lose_less() -> None:
    weight, statistics = normal_weight((96, 192)), statistics_of("input", (96, 192))
    estimator = ErrorEstimator(weight, statistics, num_rows=32, seed=0)
    for name in QUANTIZERS.keys() - {"nf"}:  # NormalFloat of 2 bits has a zero, and one negative level
        errors = [estimator.error(quantizer_from_label(f"{name}{bits}")) for bits in (2, 3, 4)]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("num_rows", [1, 7, 40])
def test_a_sample_stands_for_all_rows(num_rows: int) -> None:
    expected = torch.exp(torch.randn(100, generator=torch.Generator().manual_seed(0)))
    totals = []
    for seed in range(200):
        rows, times = sample_rows(expected, num_rows, seed)
        assert len(rows) == len(rows.unique()) <= num_rows
        totals.append(float(expected.double()[rows] @ times))
    assert sum(totals) / len(totals) == pytest.approx(float(expected.sum()), rel=0.1)


def test_all_rows_are_taken_where_there_are_no_more() -> None:
    rows, times = sample_rows(torch.zeros(5), 5, 0)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    assert (times == 1).all()
