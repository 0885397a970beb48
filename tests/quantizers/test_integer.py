"""Integers with a zero-point: the search for it, and what it is good for."""

import pytest
import torch

from quantizers import Integer, LloydMax, weighted_error
from quantizers.affine_search import search_affine
from tests.quantizers.helpers import normal_weight, uneven_statistics


def affine_error(block: torch.Tensor, weight: torch.Tensor, scale: float, zero: int, bits: int) -> float:
    codes = (block.double() / max(scale, 1e-30)).round().add(zero).clamp(0, 2**bits - 1)
    return float((weight.double() * (block.double() - (codes - zero) * scale).square()).sum())


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "fisher"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_affine_search_comes_close_to_an_exhaustive_one(bits: int, weighted: bool) -> None:
    blocks = normal_weight((12, 32)) + 0.03 * torch.arange(12)[:, None] / 12
    fisher = uneven_statistics((12, 32)).fisher_diag if weighted else torch.ones(12, 32)
    found = search_affine(blocks, fisher, bits)
    total = best_total = 0.0
    for block, weight, (scale, zero) in zip(blocks, fisher, found.tolist(), strict=True):
        span = float(block.amax() - block.amin()) / (2**bits - 1)
        trials = [
            affine_error(block, weight, span * k / 40, trial, bits) for k in range(10, 46) for trial in range(2**bits)
        ]
        total += affine_error(block, weight, scale, int(zero), bits)
        best_total += min(trials)
    assert total <= 1.15 * best_total


def test_a_block_on_one_side_of_zero_uses_all_codes() -> None:
    weight = torch.linspace(0, 3, 16)[None]
    quantized = Integer(2, 16).quantize(torch.cat([weight, -weight]))
    assert quantized.format.zeros(quantized.plain, (2, 16)).tolist() == [[0], [3]]
    symmetric = LloydMax(2, 16).quantize(weight)
    assert weighted_error(weight - quantized.dequantize()[:1], None) < weighted_error(
        weight - symmetric.dequantize(), None
    )


def test_integers_are_kept_exactly() -> None:
    codes = torch.randint(0, 8, (6, 64), generator=torch.Generator().manual_seed(0))
    codes[:, 0], codes[:, 1] = 0, 7  # every block spans all codes
    weight = (codes - 3).float() * 0.5
    torch.testing.assert_close(Integer(3).quantize(weight).dequantize(), weight, rtol=1e-6, atol=0)
