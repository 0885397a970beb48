"""Searched scales against a plain search over many of them, and the laws of rounding to a grid."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers.symmetric_uniform import UniformBlocks, largest_code, quantize_uniform

BITS = [3, 4, 6, 8]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def errors(blocks: Tensor, quantized: UniformBlocks, weights: Tensor | None = None) -> Tensor:
    values = quantized.codes.float() * quantized.scales.float()[:, None]
    squared = (blocks - values).square()
    return (squared if weights is None else squared * weights).sum(dim=1)


@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from(BITS), st.integers(0, 99))
@settings(max_examples=40)
def test_codes_are_the_nearest_within_range(num: int, size: int, bits: int, seed: int) -> None:
    blocks = torch.randn(num, size, generator=rng(seed))
    quantized = quantize_uniform(blocks, None, bits)
    q, scales = largest_code(bits), quantized.scales.float()[:, None]
    assert int(quantized.codes.abs().max()) <= q
    inside = blocks.abs() <= q * scales
    error = (blocks - quantized.codes * scales).abs()
    assert bool((error <= scales * 0.50001)[inside].all())
    assert torch.equal(quantized.codes[~inside].abs(), torch.full_like(quantized.codes[~inside], q))


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("bits", BITS)
def test_the_scale_is_near_that_of_an_exhaustive_search(bits: int, weighted: bool) -> None:
    blocks = torch.randn(20, 64, generator=rng(0))
    blocks[10:] = blocks[10:] ** 3  # heavy tails
    weights = torch.exp(torch.randn(20, 64, generator=rng(1))) if weighted else None
    found = errors(blocks, quantize_uniform(blocks, weights, bits), weights).double()
    q, reach = largest_code(bits), blocks.abs().amax(dim=1, keepdim=True)
    best = torch.full((20,), torch.inf, dtype=torch.float64)
    for multiple in torch.linspace(0.02, 1.05, 1000):
        scale = (reach * multiple / q).bfloat16().float()
        squared = (blocks - (blocks / scale).round().clamp(-q, q) * scale).square()
        best = torch.minimum(best, (squared if weights is None else squared * weights).sum(dim=1).double())
    assert float(found.sum() / best.sum()) < {3: 1.01, 4: 1.01, 6: 1.15, 8: 1.2}[bits]  # trials are coarse there


@pytest.mark.parametrize("bits", BITS)
def test_never_worse_than_reaching_the_largest(bits: int) -> None:
    blocks = torch.randn(30, 50, generator=rng(3)) ** 3
    scale = (blocks.abs().amax(dim=1) / largest_code(bits)).bfloat16()
    codes = (blocks / scale.float()[:, None]).round().clamp(-largest_code(bits), largest_code(bits)).int()
    plain = errors(blocks, UniformBlocks(codes, scale))
    assert bool((errors(blocks, quantize_uniform(blocks, None, bits)) <= plain * (1 + 1e-6)).all())


def test_more_bits_never_cost_more_error() -> None:
    blocks = torch.randn(30, 50, generator=rng(4))
    by_bits = [errors(blocks, quantize_uniform(blocks, None, bits)) for bits in BITS]
    assert all(bool((more < fewer).all()) for fewer, more in pairwise(by_bits))


def test_zeros_and_tiny_and_huge_blocks() -> None:
    blocks = torch.stack([torch.zeros(8), torch.full((8,), 1e-30), torch.full((8,), 1e15)])
    quantized = quantize_uniform(blocks, None, 4)
    assert quantized.scales[0] == 0
    assert not quantized.codes[0].any()
    torch.testing.assert_close(quantized.codes * quantized.scales.float()[:, None], blocks, rtol=0.005, atol=0)


def test_a_weight_of_zero_leaves_the_rest_alone() -> None:
    blocks = torch.randn(1, 16, generator=rng(5))
    blocks[0, 3] = 1000.0
    weights = torch.ones(1, 16)
    weights[0, 3] = 0
    error = errors(blocks, quantize_uniform(blocks, weights, 8), weights)
    assert float(error) < 0.2 * float((weights * blocks.square()).sum())
