"""How many bits each tile of a matrix gets: reverse water-filling between its tiles.

A tile's part of the loss is its distortion times a weight that is a product of what its rows and its columns count
(the pivots of both factors of the curvature, which differ by orders of magnitude: what is rounded last has nobody left
to make up for it). One more bit leaves a quarter of the distortion, so the least loss for a sum of bits is where

    bits = constant + log2(weight of the tile) / 2        within 1 to 5, in whole bits

(independent normal variables under a sum of squared errors: Cover and Thomas 2006, Elements of Information Theory,
section 10.3.3; for the columns of a language model's weights BAQ, arXiv:2506.05664). A reader gets the bits of all
tiles back from one byte for each row and each column of tiles, in sixteenths of a bit, and the number of tiles that are
a sixteenth ahead of the others, by which the sum is met exactly.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int32, Int64, UInt8
from torch import Tensor

LEAST_BITS, MOST_BITS = 1, 5
STEPS = 16  # of a bit
_FARTHEST = 60  # steps from the middle that a row or column may be: more makes no difference, and two fit into a byte
_MIDDLE = 128


@dataclass(frozen=True)
class TileRates:
    """What is stored of the bits of all tiles.

    Attributes:
        rows, columns: steps of each row and each column of tiles.
        num_ahead: int32 [1], tiles that are a step ahead of the others: the first ones, row by row.
    """

    rows: UInt8[Tensor, " rows"]
    columns: UInt8[Tensor, " columns"]
    num_ahead: Int32[Tensor, " 1"]

    def bits(self) -> Int64[Tensor, "rows columns"]:
        """Bits a weight of each tile, 1 to 5."""
        steps = self.rows.long()[:, None] + self.columns.long() - 2 * _MIDDLE
        ahead = torch.arange(steps.numel(), device=steps.device).view(steps.shape) < self.num_ahead
        return LEAST_BITS + ((steps + ahead) // STEPS).clamp(0, MOST_BITS - LEAST_BITS)


def fill_tiles(
    row_weights: Float64[Tensor, " rows"], column_weights: Float64[Tensor, " columns"], total_bits: int
) -> TileRates:
    """Rates whose bits add up to `total_bits`, as the weights ask for.

    Args:
        row_weights, column_weights: not negative; a tile's weight is the product of its row's and its column's.
        total_bits: the sum over tiles of the bits of one of their weights.
    Raises:
        ValueError: `total_bits` is less or more than what tiles of 1 to 5 bits can add up to.
    """
    num_tiles = len(row_weights) * len(column_weights)
    if not LEAST_BITS * num_tiles <= total_bits <= MOST_BITS * num_tiles:
        raise ValueError(
            f"{num_tiles} tiles of {LEAST_BITS} to {MOST_BITS} bits cannot add up to {total_bits}; ask for "
            f"{LEAST_BITS * num_tiles} to {MOST_BITS * num_tiles}"
        )
    rows, columns = _steps(row_weights), _steps(column_weights)

    def raised(steps: int, num_ahead: int) -> TileRates:
        ahead = torch.tensor([num_ahead], dtype=torch.int32, device=rows.device)
        lifted = (rows + (_MIDDLE + steps)).clamp(0, 255).to(torch.uint8)
        return TileRates(lifted, (columns + _MIDDLE).to(torch.uint8), ahead)

    lowest, highest = -_MIDDLE - _FARTHEST, _MIDDLE + _FARTHEST  # every tile has the least bits, every tile the most
    while highest - lowest > 1:
        middle = (lowest + highest) // 2
        if int(raised(middle, 0).bits().sum()) <= total_bits:
            lowest = middle
        else:
            highest = middle
    without = raised(lowest, 0).bits()
    gains = (raised(lowest, num_tiles).bits() - without).view(-1).cumsum(0)  # of the first 1, 2 ... tiles ahead
    missing = total_bits - int(without.sum())
    return raised(lowest, int(torch.searchsorted(gains, missing)) + 1 if missing else 0)


def _steps(weights: Float64[Tensor, " tiles"]) -> Int64[Tensor, " tiles"]:
    """Half the binary logarithms, in steps around their mean."""
    logarithms = weights.clamp_min(torch.finfo(weights.dtype).tiny).log2() / 2
    return ((logarithms - logarithms.mean()) * STEPS).round().long().clamp(-_FARTHEST, _FARTHEST)
