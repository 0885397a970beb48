"""The two sides of a matrix that is rounded in tiles: the factors of its curvature, and what tiles have of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from quantizers.curvature import Triangular


@dataclass(frozen=True)
class Sides:
    """A matrix's shape, the size of its tiles, and the factors of its curvature in the rotated basis.

    Attributes:
        shape: (out, in).
        tile: height and width.
        outputs: None for the identity: rows do not wait for one another.
    """

    shape: tuple[int, int]
    tile: tuple[int, int]
    outputs: Triangular | None
    inputs: Triangular

    def tile_sums(
        self, of: Callable[[Triangular], Float64[Tensor, " n"]]
    ) -> tuple[Float64[Tensor, " rows"], Float64[Tensor, " columns"]]:
        """Something that factors have for each row and column, and the identity 1, summed over those of each tile."""
        columns = of(self.inputs)
        rows = columns.new_ones(self.shape[0]) if self.outputs is None else of(self.outputs)
        return _in_tiles(rows, self.tile[0]), _in_tiles(columns, self.tile[1])

    def summed(
        self, tiles: Float64[Tensor, "rows columns"], of: Callable[[Triangular], Float64[Tensor, " n"]]
    ) -> float:
        """The sum of `tiles` ([1, 1]: all alike), each times what its rows have together and what its columns have."""
        rows, columns = self.tile_sums(of)
        return float(rows @ tiles.expand(len(rows), len(columns)) @ columns)

    def spread_out(self, tiles: Float64[Tensor, "rows columns"]) -> Float32[Tensor, "out in"]:
        """The value of its tile for each entry; [1, 1] stays as it is."""
        if tiles.shape == (1, 1):
            return tiles.float()
        rows, columns = (
            torch.arange(n, device=tiles.device) // size for n, size in zip(self.shape, self.tile, strict=True)
        )
        return tiles.float()[rows[:, None], columns]


def _in_tiles(values: Float64[Tensor, " n"], size: int) -> Float64[Tensor, " tiles"]:
    return torch.nn.functional.pad(values, (0, -len(values) % size)).view(-1, size).sum(dim=1)
