"""The rotation is orthogonal in every dimension, is the stated product, spreads outliers, and never changes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard as walsh_hadamard
from torch import Tensor

from quantizers import quantizer_from_label
from quantizers.hadamard import rotate, signs, unrotate
from quantizers.rotated_format import AbstractRotatedFormat

DIMENSIONS = [1, 2, 3, 7, 64, 192, 576, 1536, 97, 128, 8192]
# The first outputs of the published reference implementation (splitmix64.c, Vigna 2015) for the seed 1234567.
SPLIT_MIX = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]


def matrix(n: int, seed: int) -> Tensor:
    return rotate(torch.eye(n, dtype=torch.float64), seed)


def random_rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def reference_signs(n: int, seed: int) -> list[float]:
    """SplitMix64 in unbounded integers."""
    found = []
    for i in range(1, n + 1):
        z = (seed + i * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(-1.0 if (z ^ (z >> 31)) >> 63 else 1.0)
    return found


def test_signs_are_the_highest_bits_of_the_published_generator() -> None:
    assert signs(5, 1234567).tolist() == [-1.0 if output >> 63 else 1.0 for output in SPLIT_MIX]


@given(n=st.integers(1, 300), seed=st.integers(0, 2**64 - 1))
def test_signs_are_the_reference(n: int, seed: int) -> None:
    assert signs(n, seed).dtype == torch.float32
    assert signs(n, seed).tolist() == reference_signs(n, seed)


def test_signs_are_balanced_and_differ_between_seeds() -> None:
    drawn = torch.stack([signs(4096, seed) for seed in range(32)])
    correlations = drawn @ drawn.T / 4096
    assert drawn.mean(1).abs().max() < 5 / 64  # five standard deviations
    assert (correlations - torch.eye(32)).abs().max() < 5 / 64


@pytest.mark.parametrize("n", [n for n in DIMENSIONS if n <= 1536])
def test_the_rotation_is_orthogonal(n: int) -> None:
    R = matrix(n, seed=n)
    torch.testing.assert_close(R @ R.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [n for n in DIMENSIONS if n <= 1536])
def test_a_one_hot_row_is_spread(n: int) -> None:
    assert matrix(n, seed=3).abs().max() <= (2 / n) ** 0.5 + 1e-12


@pytest.mark.parametrize(("order", "odd"), [(1, 1), (8, 1), (1, 5), (4, 3), (128, 3), (64, 9)])
def test_the_rotation_is_signs_then_hadamard_kron_hartley(order: int, odd: int) -> None:
    n = order * odd
    angle = 2 * np.pi * np.outer(np.arange(odd), np.arange(odd)) / odd
    product = np.kron(walsh_hadamard(order), np.cos(angle) + np.sin(angle)) / np.sqrt(n)
    expected = np.diag(reference_signs(n, 11)) @ product
    np.testing.assert_allclose(matrix(n, 11).numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("label", ["trellis2", "e8p2", "vtrellis2.5"])
def test_a_weight_is_turned_back_as_the_format_says(label: str) -> None:
    """docs/checkpoint-format.md: W = R_out W' R_in^T, with `seed` and `seed` + 1."""
    form = quantizer_from_label(label).format
    assert isinstance(form, AbstractRotatedFormat)
    stored = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    out, into = matrix(12, form.seed).float(), matrix(20, form.seed + 1).float()
    torch.testing.assert_close(form.unrotate(stored), out @ stored @ into.T)
    torch.testing.assert_close(form.rotate(form.unrotate(stored)), stored)


def test_known_values() -> None:
    found = rotate(torch.arange(1, 7, dtype=torch.float64), seed=2024)
    s = reference_signs(6, 2024)
    a, b = ([s[i] * (i + 1) for i in half] for half in (range(3), range(3, 6)))
    third = 3**0.5 / 2  # sin of 120 degrees; cos is -1/2
    hartley = [[1, 1, 1], [1, third - 0.5, -third - 0.5], [1, -third - 0.5, third - 0.5]]
    sums, differences = ([x + sign * y for x, y in zip(a, b, strict=True)] for sign in (1, -1))
    expected = [
        sum(h * x for h, x in zip(row, half, strict=True)) / 6**0.5 for half in (sums, differences) for row in hartley
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", DIMENSIONS)
def test_unrotate_undoes_rotate(n: int, dtype: torch.dtype) -> None:
    x = random_rows(2, 3, n, dtype=dtype)
    kept = x.clone()
    y = rotate(x, seed=5)
    assert y.dtype == dtype
    assert y.shape == x.shape
    torch.testing.assert_close(unrotate(y, seed=5), x)
    torch.testing.assert_close(rotate(unrotate(x, seed=5), seed=5), x)
    assert torch.equal(x, kept)


@given(n=st.integers(1, 700), rows=st.integers(0, 4), seed=st.integers(0, 2**64 - 1))
def test_norms_and_products_are_kept(n: int, rows: int, seed: int) -> None:
    x, y = random_rows(2, rows, n)
    torch.testing.assert_close(rotate(x, seed) @ rotate(y, seed).T, x @ y.T, atol=1e-10, rtol=0)
    torch.testing.assert_close(unrotate(rotate(x, seed), seed), x, atol=1e-11, rtol=0)


def test_a_product_needs_only_the_inputs_rotated() -> None:
    weight, x = random_rows(5, 192), random_rows(3, 192)
    torch.testing.assert_close(rotate(x, 9) @ rotate(weight, 9).T, x @ weight.T)


def test_heavy_tails_become_normal() -> None:
    x = random_rows(64, 1536) ** 3
    assert kurtosis(x) > 30
    assert kurtosis(rotate(x, seed=1)) == pytest.approx(3.0, abs=0.15)


def kurtosis(rows: Tensor) -> float:
    standard = rows / rows.square().mean(1, keepdim=True).sqrt()
    return float((standard**4).mean())


@pytest.mark.parametrize("function", [rotate, unrotate])
@pytest.mark.parametrize("n", [6, 7, 8])
def test_gradients(function, n: int) -> None:
    x = random_rows(2, n).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, 4), x)


def test_a_view_and_no_rows() -> None:
    x = random_rows(12, 10)
    torch.testing.assert_close(rotate(x.T, 1), rotate(x.T.contiguous(), 1))
    assert rotate(torch.zeros(0, 12), 1).shape == (0, 12)


def test_first_use_in_inference_mode_or_on_a_default_device_leaves_no_trace() -> None:
    with torch.inference_mode():
        rotate(torch.ones(44, dtype=torch.float64), 0)
    with torch.device("meta"):
        assert signs(52, 0).device.type == "cpu"
        rotate(torch.ones(52, dtype=torch.float64, device="cpu"), 0)
    for n in (44, 52):
        x = random_rows(n).requires_grad_()
        rotate(x, 0).sum().backward()
        torch.testing.assert_close(x.grad, unrotate(torch.ones(n, dtype=torch.float64), 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [rotate, unrotate])
def test_another_dtype_is_refused(function, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="takes float32 or float64, not torch"):
        function(torch.ones(4, dtype=dtype), 0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed of a rotation is 0 to"):
        rotate(torch.ones(4), seed)


def test_no_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="positive dimension, not 0"):
        signs(0, 1)


@pytest.mark.parametrize("turn", [rotate, unrotate])
@pytest.mark.parametrize("n", [1, 3, 64, 576, 97])
def test_along_the_first_dimension_it_is_the_transpose_of_the_last(turn, n: int) -> None:
    x = random_rows(n, 5)
    torch.testing.assert_close(turn(x, 3, dim=0), turn(x.T, 3).T, atol=1e-12, rtol=0)
