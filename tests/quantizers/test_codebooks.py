"""The levels are the published ones, and the learned ones satisfy the conditions that define them."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm, truncnorm

from quantizers.abstract_block_format import BITS
from quantizers.codebooks import lloyd_max, normal_float

# bitsandbytes' and QLoRA's NF4 (arXiv:2305.14314, appendix E).
NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
# Max 1960, table I: the positive output levels, and the mean squared error, for 4, 8 and 16 levels.
MAX_LEVELS = {
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}
MAX_ERRORS = {2: 0.1175, 3: 0.03454, 4: 0.009497}


def test_nf4_is_the_published_one_bit_for_bit() -> None:
    assert normal_float(4).tolist() == NF4
    assert torch.equal(normal_float(4), torch.tensor(NF4, dtype=torch.float32))


def test_nf2_is_the_one_of_lq_lora() -> None:
    assert normal_float(2).tolist() == pytest.approx([-1.0, 0.0, 0.3379, 1.0], abs=5e-5)


@pytest.mark.parametrize("codebook", [normal_float, lloyd_max])
@pytest.mark.parametrize("bits", BITS)
def test_levels_ascend_to_one(codebook, bits: int) -> None:
    levels = codebook(bits)
    assert levels.shape == (2**bits,)
    assert levels.dtype == torch.float32
    assert (levels.diff() > 0).all()
    assert levels[0] == -1
    assert levels[-1] == 1


@pytest.mark.parametrize("bits", BITS)
def test_normal_float_has_a_zero_and_one_level_more_above_it(bits: int) -> None:
    levels = normal_float(bits)
    assert int((levels == 0).sum()) == 1
    assert int((levels > 0).sum()) == int((levels < 0).sum()) + 1


@pytest.mark.parametrize("bits", BITS)
def test_lloyd_max_is_exactly_odd(bits: int) -> None:
    assert torch.equal(lloyd_max(bits), -lloyd_max(bits).flip(0))


def true_scale(levels: np.ndarray) -> float:
    """What the levels were divided by: the largest one is the mean of its cell."""
    edge = (levels[-1] + levels[-2]) / 2
    return brentq(lambda scale: scale - norm.pdf(scale * edge) / norm.sf(scale * edge), 1.0, 7.0, xtol=1e-14)


@pytest.mark.parametrize("bits", MAX_LEVELS)
def test_lloyd_max_is_the_published_table(bits: int) -> None:
    levels = lloyd_max(bits).double().numpy()
    positive = (levels * true_scale(levels))[2 ** (bits - 1) :]
    np.testing.assert_allclose(positive, MAX_LEVELS[bits], atol=6e-4)


@pytest.mark.parametrize("bits", BITS)
def test_lloyd_max_levels_are_the_means_of_their_cells(bits: int) -> None:
    levels = lloyd_max(bits).double().numpy()
    levels = levels * true_scale(levels)
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    np.testing.assert_allclose(levels, truncnorm.mean(edges[:-1], edges[1:]), atol=2e-6)


@pytest.mark.parametrize("bits", MAX_ERRORS)
def test_lloyd_max_reaches_the_published_error(bits: int) -> None:
    levels = lloyd_max(bits).double().numpy()
    levels = levels * true_scale(levels)
    edges = np.concatenate([[-12.0], (levels[1:] + levels[:-1]) / 2, [12.0]])
    error = sum(
        quad(lambda x, level=level: (x - level) ** 2 * norm.pdf(x), low, high)[0]
        for level, low, high in zip(levels, edges[:-1], edges[1:], strict=True)
    )
    assert error == pytest.approx(MAX_ERRORS[bits], rel=1e-3)
