"""Factors of a curvature: they multiply back to it, and damping never fails."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers.curvature import DAMPING, Triangular, factorize, lower_factor

SIZES = [1, 3, 17, 97, 576]


def curvature(size: int, seed: int = 0) -> Tensor:
    """A second moment of correlated inputs of uneven size, of full rank."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64) + 3 * torch.eye(size, dtype=torch.float64)
    mix *= torch.rand(size, 1, generator=generator, dtype=torch.float64) + 0.1
    return (mix @ mix.T).float()


def damped(matrix: Tensor, damping: float) -> Tensor:
    wide = matrix.double()
    return wide + damping * wide.diagonal().mean() * torch.eye(len(wide), dtype=torch.float64)


def product(factors: Triangular) -> Tensor:
    upper = factors.unit_upper.double()
    return (upper * factors.pivots.double()) @ upper.T


def block_diagonal(factors: Triangular, size: int) -> Tensor:
    """D of H = U' D U'^T, where U' is the identity within blocks: what is left when U' is divided out."""
    result = torch.zeros(len(factors.pivots), len(factors.pivots), dtype=torch.float64)
    for start in range(0, len(result), size):
        block = slice(start, start + size)
        inner = factors.unit_upper[block, block].double()
        result[block, block] = (inner * factors.pivots[block].double()) @ inner.T
    return result


@pytest.mark.parametrize("size", SIZES)
def test_the_factors_multiply_back_to_the_damped_matrix(size: int) -> None:
    matrix = curvature(size)
    factors = factorize(matrix)
    assert factors.damping == DAMPING
    assert torch.equal(factors.unit_upper.triu(), factors.unit_upper)
    assert (factors.unit_upper.diagonal() == 1).all()
    assert (factors.pivots > 0).all()
    expected = damped(matrix, DAMPING)
    torch.testing.assert_close(product(factors), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    lower = lower_factor(matrix).double()
    assert torch.equal(lower.tril(), lower)
    torch.testing.assert_close(lower @ lower.T, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("block", [1, 8, 16, 1000])
@pytest.mark.parametrize("size", SIZES)
def test_factors_in_blocks_are_of_the_same_matrix(size: int, block: int) -> None:
    factors = factorize(curvature(size))
    blocked = factors.in_blocks(block)
    for start in range(0, size, block):
        inner = blocked.unit_upper[start : start + block, start : start + block]
        torch.testing.assert_close(inner, torch.eye(len(inner)), rtol=0, atol=1e-5)
    middle = block_diagonal(factors, block)
    torch.testing.assert_close(blocked.pivots.double(), middle.diagonal(), rtol=1e-4, atol=0)
    upper = blocked.unit_upper.double()
    expected = product(factors)
    torch.testing.assert_close(upper @ middle @ upper.T, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_whole_blocks_leave_no_feedback_and_the_matrix_own_diagonal() -> None:
    factors = factorize(curvature(17))
    blocked = factors.in_blocks(17)
    torch.testing.assert_close(blocked.unit_upper, torch.eye(17), rtol=0, atol=1e-5)
    torch.testing.assert_close(blocked.pivots, product(factors).diagonal().float(), rtol=1e-4, atol=0)


@settings(max_examples=20)
@given(size=st.integers(1, 40), seed=st.integers(0, 1000), exponent=st.integers(-25, 25))
def test_the_unit_of_the_curvature_changes_the_pivots_alone(size: int, seed: int, exponent: int) -> None:
    matrix = curvature(size, seed)
    factors, scaled = factorize(matrix), factorize(matrix * 2.0**exponent)
    torch.testing.assert_close(scaled.unit_upper, factors.unit_upper)
    torch.testing.assert_close(scaled.pivots, factors.pivots * 2.0**exponent)


@pytest.mark.parametrize("size", [3, 17, 97])
def test_a_rank_one_matrix_needs_its_damping_and_no_more(size: int) -> None:
    vector = torch.randn(size, 1, generator=torch.Generator().manual_seed(0))
    factors = factorize(vector @ vector.T)
    assert factors.damping == DAMPING
    expected = damped(vector @ vector.T, DAMPING)
    torch.testing.assert_close(product(factors), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_dead_inputs_get_the_damping_as_their_curvature() -> None:
    matrix = curvature(17)
    matrix[5], matrix[:, 5] = 0, 0
    factors = factorize(matrix)
    assert factors.damping == DAMPING
    assert float(factors.pivots[5]) == pytest.approx(DAMPING * float(matrix.diagonal().mean()), rel=1e-5)
    assert (factors.unit_upper[5, 6:] == 0).all()
    assert (factors.unit_upper[:5, 5] == 0).all()


def test_an_indefinite_matrix_gets_ten_times_more_until_it_can_be_factorized() -> None:
    matrix = torch.diag(torch.tensor([2.0, 2.0, -0.3]))  # mean 1.2333; 0.1 of it is not enough, 1 is
    factors = factorize(matrix)
    assert factors.damping == pytest.approx(1.0)
    torch.testing.assert_close(product(factors), damped(matrix, factors.damping), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(5, 5),
        torch.full((5, 5), float("nan")),
        torch.diag(torch.tensor([1.0, 1.0, float("nan")])),
        torch.diag(torch.tensor([1.0, float("inf")])),
        -torch.eye(4),
        torch.tensor([[1.0, 1e4], [1e4, 1.0]]),  # no damping up to MOST_DAMPING makes it definite
    ],
    ids=["zeros", "nan", "one-nan", "infinite", "negative", "indefinite"],
)
def test_what_cannot_be_factorized_counts_as_no_curvature(matrix: Tensor) -> None:
    factors = factorize(matrix)
    assert factors.damping == float("inf")
    assert torch.equal(factors.unit_upper, torch.eye(len(matrix)))
    assert torch.equal(factors.pivots, torch.ones(len(matrix)))
    assert torch.equal(lower_factor(matrix), torch.eye(len(matrix)))
