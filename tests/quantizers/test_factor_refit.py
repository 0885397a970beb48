"""Refitted factors: never worse than rounding alone, exact least squares inside, and what few bits keep of the gain."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers.factor_refit import refit_factors
from quantizers.factors import FACTOR_BITS, FactorFormat, dequantize_factors, quantize_into, quantize_out
from solvers.low_rank import Factors, errors_by_rank, whitened_spectrum, whitened_svd
from tests.solvers.weightings import FORMS, factor, whitened_error


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def residual_of(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=rng(seed))


@given(
    st.integers(2, 40), st.integers(2, 40), st.integers(1, 4), st.sampled_from(FACTOR_BITS),
    st.sampled_from(FORMS), st.sampled_from(FORMS), st.integers(0, 50),
)  # fmt: skip
@settings(max_examples=40)
def test_the_best_pair_is_kept_and_its_error_is_true(
    rows: int, columns: int, rank: int, bits: int, row_form: str, column_form: str, seed: int
) -> None:
    rank, form = min(rank, rows, columns), FactorFormat(bits)
    residual = residual_of(rows, columns, seed)
    row_factor, column_factor = factor(rows, row_form, seed + 1), factor(columns, column_form, seed + 2)
    fit = refit_factors(residual, form, rank, row_factor=row_factor, column_factor=column_factor, rounds=2)
    assert len(fit.errors) == 5
    back = dequantize_factors(fit.tensors, form, (rows, columns), rank)
    true = whitened_error(residual - back.product(), row_factor, column_factor)
    total = whitened_error(residual, row_factor, column_factor)
    assert fit.error == pytest.approx(true, rel=1e-3, abs=1e-6 * total)
    assert fit.error <= fit.errors[0]
    best = float(errors_by_rank(whitened_spectrum(residual, row_factor, column_factor))[rank])
    assert fit.error >= best - 1e-5 * total


@pytest.mark.parametrize("bits", [3, 4])
def test_refitting_wins_back_a_good_part_of_what_rounding_lost(bits: int) -> None:
    residual = residual_of(150, 10) @ residual_of(10, 120, 1)
    fit = refit_factors(residual, FactorFormat(bits), 10)
    assert fit.error < 0.92 * fit.errors[0]


@pytest.mark.parametrize(("row_form", "column_form"), [("none", "none"), ("full", "diagonal"), ("diagonal", "full")])
def test_each_half_step_is_the_weighted_least_squares_solution(row_form: str, column_form: str) -> None:
    residual, form, shape = residual_of(20, 30), FactorFormat(16), (20, 30)
    row_factor, column_factor = factor(20, row_form, 1), factor(30, column_form, 2)
    start = whitened_svd(residual, row_factor, column_factor, 3)
    start = Factors(start.out.sign(), start.into)  # far from the optimum, and exact in bfloat16
    fit = refit_factors(residual, form, 3, row_factor=row_factor, column_factor=column_factor, init=start, rounds=1)

    def dense(size: int, given_factor: Tensor | None) -> Tensor:
        if given_factor is None:
            return torch.eye(size, dtype=torch.float64)
        return given_factor.double().diag() if given_factor.ndim == 1 else given_factor.double()

    left, right = dense(20, row_factor).T, dense(30, column_factor)
    into = torch.linalg.lstsq(left @ start.out.double(), left @ residual.double()).solution
    rounded = quantize_into(into.float(), form)["low_rank_in"].double()
    out = torch.linalg.lstsq((rounded @ right).T, (residual.double() @ right).T).solution.T
    stored = quantize_out(out.float(), form) | {"low_rank_in": rounded.bfloat16()}
    expected = dequantize_factors(stored, form, shape, 3).product()
    found = dequantize_factors(fit.tensors, form, shape, 3).product()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
    assert fit.errors[2] < fit.errors[1] < fit.errors[0]


KEPT = {16: 0.999, 8: 0.995, 6: 0.98, 4: 0.9, 3: 0.75}


@pytest.mark.parametrize("bits", FACTOR_BITS)
def test_what_few_bits_keep_of_the_gain_of_a_residual_fit(bits: int) -> None:
    residual = residual_of(192, 160)  # a rounding residual: nearly white, weighted by a decaying input spectrum
    row_factor, column_factor = factor(192, "diagonal", 1), factor(160, "full", 2)
    errors = errors_by_rank(whitened_spectrum(residual, row_factor, column_factor))
    fit = refit_factors(residual, FactorFormat(bits), 8, row_factor=row_factor, column_factor=column_factor)
    kept = float((errors[0] - fit.error) / (errors[0] - errors[8]))
    assert KEPT[bits] < kept < 1.001


def test_zeros_and_dependent_components() -> None:
    for bits in FACTOR_BITS:
        form = FactorFormat(bits)
        assert refit_factors(torch.zeros(6, 5), form, 2).error == 0
        one = torch.ones(20, 1) @ torch.ones(1, 16)
        assert refit_factors(one, form, 3).error < 1e-3 * float(one.square().sum())


def test_bad_input_is_refused() -> None:
    residual, form = residual_of(6, 5), FactorFormat(4)
    with pytest.raises(ValueError, match=r"rank 6 .*it must be 1 to 5"):
        refit_factors(residual, form, 6)
    with pytest.raises(ValueError, match="rounds is -1"):
        refit_factors(residual, form, 2, rounds=-1)
    with pytest.raises(ValueError, match=r"column factor .* not lower triangular"):
        refit_factors(residual, form, 2, column_factor=torch.ones(5, 5))
