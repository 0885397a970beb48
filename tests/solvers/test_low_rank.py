"""Low-rank approximations against the dense singular value decomposition in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from solvers.low_rank import (
    OVERSAMPLING,
    Factors,
    errors_by_rank,
    truncated_svd,
    whitened_spectrum,
    whitened_svd,
)
from tests.solvers.weightings import FORMS, as_matrix, factor, whitened_error

SMALL, LARGE = (24, 40), (300, 200)  # the first is solved densely, the second by the randomized method


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(shape: tuple[int, int], values: Tensor, seed: int = 0) -> Tensor:
    """A matrix with these singular values and random singular vectors."""
    rank = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], rank, generator=rng(seed), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(shape[1], rank, generator=rng(seed + 1), dtype=torch.float64)).Q
    return ((left * values) @ right.T).float()


def error_of(matrix: Tensor, factors: Factors) -> float:
    return float(torch.linalg.norm(matrix.double() - factors.out.double() @ factors.into.double()))


def optimal_error(matrix: Tensor, rank: int) -> float:
    """The tail of the singular values (Eckart and Young 1936)."""
    return float(torch.linalg.norm(torch.linalg.svdvals(matrix.double())[rank:]))


SPECTRA = {
    "flat": lambda n: torch.ones(n, dtype=torch.float64),
    "inverse-root": lambda n: torch.arange(1, n + 1, dtype=torch.float64) ** -0.5,
    "inverse": lambda n: torch.arange(1, n + 1, dtype=torch.float64) ** -1.0,
    "noise": lambda n: torch.linspace(2, 0.1, n, dtype=torch.float64),
    "exponential": lambda n: 0.9 ** torch.arange(n, dtype=torch.float64),
}


def test_the_two_shapes_take_the_two_ways() -> None:
    assert min(SMALL) <= 3 * (1 + OVERSAMPLING)
    assert min(LARGE) > 3 * (32 + OVERSAMPLING)


@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [LARGE, LARGE[::-1], (64, 500)], ids=str)
def test_within_a_percent_of_the_best(shape: tuple[int, int], spectrum: str, rank: int) -> None:
    matrix = with_spectrum(shape, SPECTRA[spectrum](min(shape)))
    best = optimal_error(matrix, rank)
    error = error_of(matrix, truncated_svd(matrix, rank))
    assert best * (1 - 1e-5) <= error <= 1.01 * best


@pytest.mark.parametrize("rank", [1, 7, 24])
@pytest.mark.parametrize("shape", [SMALL, SMALL[::-1]], ids=str)
def test_small_matrices_are_solved_exactly(shape: tuple[int, int], rank: int) -> None:
    matrix = torch.randn(shape, generator=rng())
    error = error_of(matrix, truncated_svd(matrix, rank))
    assert error == pytest.approx(optimal_error(matrix, rank), rel=1e-4, abs=1e-5 * float(matrix.norm()))


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
def test_a_matrix_of_low_rank_is_recovered(shape: tuple[int, int]) -> None:
    left = torch.randn(shape[0], 5, generator=rng(1))
    matrix = left @ torch.randn(5, shape[1], generator=rng(2))
    for rank in (5, 9):
        factors = truncated_svd(matrix, rank)
        assert factors.out.shape == (shape[0], rank)
        assert factors.into.shape == (rank, shape[1])
        assert error_of(matrix, factors) < 1e-5 * float(matrix.norm())


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
def test_the_singular_values_are_split_evenly(shape: tuple[int, int]) -> None:
    factors = truncated_svd(torch.randn(shape, generator=rng()), 6)
    torch.testing.assert_close(factors.out.norm(dim=0), factors.into.norm(dim=1), rtol=1e-4, atol=1e-4)
    gram = factors.out.T @ factors.out
    torch.testing.assert_close(gram, torch.diag(gram.diag()), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
def test_two_sided_is_the_dense_solution_of_the_scaled_problem(shape: tuple[int, int]) -> None:
    rank = 6
    values = 2.0 ** -torch.arange(min(shape), dtype=torch.float64)
    rows = torch.rand(shape[0], generator=rng(3)) + 0.1
    columns = 10 ** torch.randn(shape[1], generator=rng(4))
    matrix = with_spectrum(shape, values) / rows[:, None] / columns
    scaled = (rows[:, None] * matrix * columns).double()
    left, singular, right = torch.linalg.svd(scaled, full_matrices=False)
    best = (left[:, :rank] * singular[:rank]) @ right[:rank]
    factors = whitened_svd(matrix, rows, columns, rank)
    found = rows[:, None] * (factors.out @ factors.into) * columns
    torch.testing.assert_close(found.double(), best, rtol=0, atol=1e-4)


def test_two_sided_beats_plain_under_its_weights_and_equals_it_under_equal_ones() -> None:
    matrix = torch.randn(SMALL, generator=rng())
    rows, columns = torch.rand(24, generator=rng(3)) + 0.05, torch.rand(40, generator=rng(4)) + 0.05

    def weighted_error(factors: Factors) -> float:
        return float((rows[:, None] * (matrix - factors.out @ factors.into) * columns).norm())

    assert weighted_error(whitened_svd(matrix, rows, columns, 4)) < 0.98 * weighted_error(truncated_svd(matrix, 4))
    equal = whitened_svd(matrix, torch.full((24,), 2.0), torch.full((40,), 0.5), 4)
    plain = truncated_svd(matrix, 4)
    torch.testing.assert_close(equal.out @ equal.into, plain.out @ plain.into, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [0, -1, 25])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} .*\(24, 40\); it must be 1 to 24"):
        truncated_svd(torch.randn(SMALL, generator=rng()), rank)
    with pytest.raises(ValueError, match=f"rank {rank}"):
        whitened_svd(torch.randn(SMALL, generator=rng()), torch.ones(24), torch.ones(40), rank)


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
def test_same_input_same_factors_and_no_global_randomness(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=rng())
    before, state = matrix.clone(), torch.random.get_rng_state()
    first = truncated_svd(matrix, 4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(matrix, before)
    torch.rand(3)
    second = truncated_svd(matrix, 4)
    assert torch.equal(first.out, second.out)
    assert torch.equal(first.into, second.into)


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
def test_a_matrix_of_zeros_has_zero_factors(shape: tuple[int, int]) -> None:
    factors = truncated_svd(torch.zeros(shape), 3)
    assert error_of(torch.zeros(shape), factors) == 0
    assert torch.isfinite(factors.out).all()
    assert torch.isfinite(factors.into).all()


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from(FORMS), st.sampled_from(FORMS), st.integers(0, 100))
@settings(max_examples=40)
def test_the_error_of_every_rank_is_what_the_spectrum_leaves_over(
    rows: int, columns: int, row_form: str, column_form: str, seed: int
) -> None:
    residual = torch.randn(rows, columns, generator=rng(seed))
    row_factor, column_factor = factor(rows, row_form, seed + 1), factor(columns, column_form, seed + 2)
    spectrum = whitened_spectrum(residual, row_factor, column_factor)
    total = whitened_error(residual, row_factor, column_factor)
    errors = errors_by_rank(spectrum)
    assert errors.shape == (min(rows, columns) + 1,)
    assert float(errors[0]) == pytest.approx(total, rel=1e-5)
    assert errors[-1] == 0
    for rank in range(1, min(rows, columns) + 1):
        left_over = total - float(spectrum[:rank].double().square().sum())
        factors = whitened_svd(residual, row_factor, column_factor, rank)
        error = whitened_error(residual - factors.product(), row_factor, column_factor)
        assert float(errors[rank]) == pytest.approx(left_over, abs=1e-5 * total)
        assert error == pytest.approx(float(errors[rank]), rel=1e-3, abs=1e-6 * total)


@pytest.mark.parametrize("rank", [1, 3])
def test_gradient_descent_finds_nothing_better_than_whitened_svd(rank: int) -> None:
    residual = torch.randn(9, 7, generator=rng())
    row_factor, column_factor = factor(9, "full", 1), factor(7, "full", 2)
    best = float(errors_by_rank(whitened_spectrum(residual, row_factor, column_factor))[rank])
    row_weight, column_weight = as_matrix(row_factor, 9), as_matrix(column_factor, 7)
    found = []
    for seed in range(4):
        out = torch.randn(9, rank, generator=rng(seed), dtype=torch.float64).requires_grad_()
        into = torch.randn(rank, 7, generator=rng(seed + 9), dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.LBFGS([out, into], max_iter=500, line_search_fn="strong_wolfe")

        def loss(out: Tensor = out, into: Tensor = into, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            error = residual.double() - out @ into
            value = torch.trace(row_weight @ error @ column_weight @ error.T)
            value.backward()
            return value

        optimizer.step(loss)
        found.append(loss().item())
    assert min(found) == pytest.approx(best, rel=1e-4)
    assert min(found) >= best * (1 - 1e-5)


def test_whitened_is_the_same_for_diagonals_as_matrices_and_plain_for_none() -> None:
    matrix = torch.randn(SMALL, generator=rng())
    rows, columns = torch.rand(24, generator=rng(3)) + 0.05, torch.rand(40, generator=rng(4)) + 0.05
    expected = whitened_svd(matrix, rows, columns, 5).product()
    for row_factor, column_factor in [(rows.diag(), columns.diag()), (rows.diag(), columns)]:
        found = whitened_svd(matrix, row_factor, column_factor, 5).product()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(whitened_svd(matrix, None, None, 5).product(), truncated_svd(matrix, 5).product())


def test_whitened_beats_plain_and_diagonal_under_its_weights() -> None:
    matrix = torch.randn(SMALL, generator=rng())
    row_factor, column_factor = factor(24, "full", 1), factor(40, "full", 2)
    rows, columns = (as_matrix(f, len(f)).diagonal().sqrt().float() for f in (row_factor, column_factor))
    plain, diagonal, whitened = (
        whitened_error(matrix - factors.product(), row_factor, column_factor)
        for factors in (
            truncated_svd(matrix, 4),
            whitened_svd(matrix, rows, columns, 4),
            whitened_svd(matrix, row_factor, column_factor, 4),
        )
    )
    assert whitened < 0.98 * min(plain, diagonal)


def test_large_whitened_problems_are_within_a_percent_of_the_best() -> None:
    matrix = torch.randn(LARGE, generator=rng())
    row_factor, column_factor = factor(300, "full", 1), factor(200, "full", 2)
    best = float(errors_by_rank(whitened_spectrum(matrix, row_factor, column_factor))[16])
    factors = whitened_svd(matrix, row_factor, column_factor, 16)
    error = whitened_error(matrix - factors.product(), row_factor, column_factor)
    assert best * (1 - 1e-4) <= error <= 1.01 * best


@pytest.mark.parametrize("rank", [0, 25])
def test_whitened_refuses_a_rank_out_of_range(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} .*it must be 1 to 24"):
        whitened_svd(torch.randn(SMALL, generator=rng()), None, None, rank)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 50))
@settings(max_examples=25)
def test_balancing_keeps_the_product_and_evens_out_the_norms(rows: int, columns: int, rank: int, seed: int) -> None:
    rank = min(rows, columns, rank)
    factors = Factors(
        100 * torch.randn(rows, rank, generator=rng(seed)), torch.randn(rank, columns, generator=rng(seed + 1))
    )
    balanced = factors.balanced()
    size = float(factors.product().abs().max())
    torch.testing.assert_close(balanced.product(), factors.product(), rtol=0, atol=1e-5 * size)
    for gram in (balanced.out.T @ balanced.out, balanced.into @ balanced.into.T):
        torch.testing.assert_close(gram, balanced.out.norm(dim=0).square().diag(), rtol=0, atol=1e-3 * size)
