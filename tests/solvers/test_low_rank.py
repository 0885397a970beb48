"""Low-rank approximations against the dense singular value decomposition in double precision."""

import pytest
import torch
from torch import Tensor

from solvers.low_rank import OVERSAMPLING, Factors, truncated_svd, two_sided_svd

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
    factors = two_sided_svd(matrix, rows, columns, rank)
    found = rows[:, None] * (factors.out @ factors.into) * columns
    torch.testing.assert_close(found.double(), best, rtol=0, atol=1e-4)


def test_two_sided_beats_plain_under_its_weights_and_equals_it_under_equal_ones() -> None:
    matrix = torch.randn(SMALL, generator=rng())
    rows, columns = torch.rand(24, generator=rng(3)) + 0.05, torch.rand(40, generator=rng(4)) + 0.05

    def weighted_error(factors: Factors) -> float:
        return float((rows[:, None] * (matrix - factors.out @ factors.into) * columns).norm())

    assert weighted_error(two_sided_svd(matrix, rows, columns, 4)) < 0.98 * weighted_error(truncated_svd(matrix, 4))
    equal = two_sided_svd(matrix, torch.full((24,), 2.0), torch.full((40,), 0.5), 4)
    plain = truncated_svd(matrix, 4)
    torch.testing.assert_close(equal.out @ equal.into, plain.out @ plain.into, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [0, -1, 25])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} .*\(24, 40\); it must be 1 to 24"):
        truncated_svd(torch.randn(SMALL, generator=rng()), rank)
    with pytest.raises(ValueError, match=f"rank {rank}"):
        two_sided_svd(torch.randn(SMALL, generator=rng()), torch.ones(24), torch.ones(40), rank)


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
