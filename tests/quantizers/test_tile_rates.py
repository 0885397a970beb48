"""Reverse water-filling over tiles: the sum is met to the bit, and no other whole bits of that sum do much better."""

import heapq

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers.tile_rates import LEAST_BITS, MOST_BITS, fill_tiles


def weights(n: int, spread: float, seed: int) -> Tensor:
    """Log-normal, `spread` the standard deviation of the logarithm."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(n, generator=generator, dtype=torch.float64)).exp()


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    spread=st.sampled_from([0.0, 0.5, 3.0, 40.0]),
    share=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_the_bits_add_up_exactly(rows: int, columns: int, spread: float, share: float, seed: int) -> None:
    least, most = LEAST_BITS * rows * columns, MOST_BITS * rows * columns
    total = least + round(share * (most - least))
    bits = fill_tiles(weights(rows, spread, seed), weights(columns, spread, seed + 1), total).bits()
    assert bits.shape == (rows, columns)
    assert int(bits.sum()) == total
    assert LEAST_BITS <= int(bits.min()) <= int(bits.max()) <= MOST_BITS


@pytest.mark.parametrize("average", [1.25, 2.0, 2.5, 3.75, 4.875])
def test_hardly_anything_is_lost_against_the_best_whole_bits(average: float) -> None:
    rows, columns = weights(24, 0.8, 1), weights(30, 1.2, 2)
    total = int(average * 24 * 30)
    tile_weights = rows[:, None] * columns

    def loss(bits: Tensor) -> float:
        return float((tile_weights * 0.25 ** bits.double()).sum())

    assert loss(fill_tiles(rows, columns, total).bits()) < 1.01 * loss(best_bits(tile_weights, total))
    if average < 4:
        assert loss(best_bits(tile_weights, total)) < 0.9 * float(tile_weights.sum()) * 0.25**average


def best_bits(tile_weights: Tensor, total: int) -> Tensor:
    """Bit by bit to where one more gains most, which is optimal since gains of a tile only fall."""
    flat = tile_weights.view(-1).tolist()
    bits = [LEAST_BITS] * len(flat)
    gains = [(-weight * 0.25**LEAST_BITS, tile) for tile, weight in enumerate(flat)]
    heapq.heapify(gains)
    for _ in range(total - LEAST_BITS * len(flat)):
        gain, tile = heapq.heappop(gains)
        bits[tile] += 1
        if bits[tile] < MOST_BITS:
            heapq.heappush(gains, (gain / 4, tile))
    return torch.tensor(bits).view(tile_weights.shape)


def test_equal_weights_get_equal_bits_or_one_more() -> None:
    ones = torch.ones(7, dtype=torch.float64)
    assert fill_tiles(ones, ones, 98).bits().unique().tolist() == [2]
    assert fill_tiles(ones, ones, 99).bits().view(-1).tolist() == [3] + [2] * 48


def test_rows_without_any_weight_get_the_least() -> None:
    rows, columns = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    assert fill_tiles(rows, columns, 28).bits().tolist() == [[3] * 4, [1] * 4, [3] * 4]


@pytest.mark.parametrize("total", [11, 61])
def test_what_no_bits_add_up_to_is_refused(total: int) -> None:
    ones = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"12 tiles of 1 to 5 bits cannot add up to {total}; ask for 12 to 60"):
        fill_tiles(ones, torch.ones(4, dtype=torch.float64), total)
