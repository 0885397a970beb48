"""A rotated weight in tiles of 16 x 16, each a tail-biting path through a trellis of its own number of bits.

    <module>.weight_packed        int32 [words]    symbols, tile by tile (row of tiles by row of tiles); a tile of b
                                                   bits a weight takes 8 b words
    <module>.weight_scale         float32 [1]      what the levels are multiplied by
    <module>.weight_row_rates     uint8 [rows]     with the next two the bits of each tile, see tile_rates.py
    <module>.weight_column_rates  uint8 [columns]
    <module>.weight_num_ahead     int32 [1]

    Q = R_out (scale * levels[states]) R_in^T,   R as in rotated_format.py

The tiles' bits add up to the whole part of `bits` times the number of tiles. Where a side is no multiple of 16, the
last tiles are padded, and the padding is stored. The levels of all widths stand one after the other, 1 bit first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from quantizers.compiled import decoded_tiles, tile_product
from quantizers.format import TensorSpecs
from quantizers.packing import WORD_BITS, unpack
from quantizers.rotated_format import AbstractRotatedFormat
from quantizers.tile_rates import LEAST_BITS, MOST_BITS, TileRates
from quantizers.trellis import decode, has_trellis_levels, trellis_levels
from quantizers.trellis_format import TILE, from_tiles, num_tiles

WIDTHS = range(LEAST_BITS, MOST_BITS + 1)
WORDS_A_BIT = TILE * TILE // WORD_BITS  # of a tile
SHARES = 8  # of a bit: `bits` is a multiple of one


@dataclass(frozen=True)
class VariableTrellisFormat(AbstractRotatedFormat):
    """See the module.

    Attributes:
        bits: of a symbol on average, 1 to 5 in eighths.
        state_bits: of a state at the widths that have levels for so many; 8 at the others.
        seed: of the rotations.
    """

    kind: ClassVar[str] = "variable_trellis"
    plain_names: ClassVar[tuple[str, ...]] = (
        "weight_packed",
        "weight_scale",
        "weight_row_rates",
        "weight_column_rates",
        "weight_num_ahead",
    )
    bits: float
    state_bits: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (LEAST_BITS <= self.bits <= MOST_BITS and self.bits * SHARES == int(self.bits * SHARES)):
            raise ValueError(f"bits is {self.bits}; it must be {LEAST_BITS} to {MOST_BITS}, in steps of {1 / SHARES:g}")
        if not any(has_trellis_levels(bits, self.state_bits) for bits in WIDTHS):
            raise ValueError(f"state_bits is {self.state_bits}; no trellis levels were trained for so many")

    @property
    def plain_label(self) -> str:
        """See StorageFormat."""
        return f"vtrellis{self.bits:g}-l{self.state_bits}"

    @property
    def codebook_name(self) -> str:
        """See StorageFormat."""
        return f"vtrellis-l{self.state_bits}"

    @property
    def levels(self) -> Float32[Tensor, " states"]:
        """The levels of all widths, one after the other."""
        return torch.cat([trellis_levels(bits, self.state_bits_of(bits)) for bits in WIDTHS])

    @property
    def meaning(self) -> str:
        """See StorageFormat."""
        states = 2**self.state_bits
        return f"{self.bits:g} bits, more where errors count more; rotated and trellis-coded with {states} states"

    def state_bits_of(self, bits: int) -> int:
        """Of the trellis of tiles with `bits` bits."""
        return self.state_bits if has_trellis_levels(bits, self.state_bits) else 8

    def levels_of(self, bits: int, levels: Float32[Tensor, " states"]) -> Float32[Tensor, " some"]:
        """Those of one width."""
        sizes = [2 ** self.state_bits_of(width) for width in WIDTHS]
        return levels.split(sizes)[bits - LEAST_BITS]

    def total_bits(self, shape: tuple[int, int]) -> int:
        """The sum of the bits of all tiles."""
        rows, columns = num_tiles(shape)
        return int(self.bits * rows * columns)

    def plain_specs(self, shape: tuple[int, int]) -> TensorSpecs:
        """See StorageFormat."""
        rows, columns = num_tiles(shape)
        return {
            "weight_packed": ((WORDS_A_BIT * self.total_bits(shape),), torch.int32),
            "weight_scale": ((1,), torch.float32),
            "weight_row_rates": ((rows,), torch.uint8),
            "weight_column_rates": ((columns,), torch.uint8),
            "weight_num_ahead": ((1,), torch.int32),
        }

    def decode_rotated(
        self, stored: dict[str, Tensor], shape: tuple[int, int], levels: Float32[Tensor, " states"]
    ) -> Float32[Tensor, "out in"]:
        """See AbstractRotatedFormat.

        Raises:
            ValueError: the bits of the tiles do not add up to what is packed.
        """
        words, bits = stored["weight_packed"], _tile_bits(stored)
        rows, columns = bits.shape
        num_words = WORDS_A_BIT * int(bits.sum())
        if num_words != len(words):
            raise ValueError(
                f"the tiles take {num_words} words by their rates, but {len(words)} are there; the file is damaged"
            )
        found = decoded_tiles(words, bits, self._state_bits, levels, stored["weight_scale"], shape)
        if found is not None:
            return found
        tiles = levels.new_empty(rows * columns, TILE * TILE)
        for width, here, places in tiles_by_width(bits):
            symbols = unpack(words[places].view(-1), width, len(here) * TILE * TILE).view(-1, TILE * TILE)
            tiles[here] = decode(symbols, self.levels_of(width, levels), width)
        tiles = (tiles * stored["weight_scale"]).view(rows, columns, TILE, TILE)
        return from_tiles(tiles)[: shape[0], : shape[1]]

    def rotated_product(
        self,
        x: Float[Tensor, "... in"],
        stored: dict[str, Tensor],
        shape: tuple[int, int],
        levels: Float32[Tensor, " states"],
    ) -> Float[Tensor, "... out"]:
        """See AbstractRotatedFormat."""
        bits, scale = _tile_bits(stored), stored["weight_scale"]
        found = tile_product(x, stored["weight_packed"], bits, self._state_bits, levels, scale, shape)
        return super().rotated_product(x, stored, shape, levels) if found is None else found

    @property
    def _state_bits(self) -> dict[int, int]:
        return {width: self.state_bits_of(width) for width in WIDTHS}


def _tile_bits(stored: dict[str, Tensor]) -> Int64[Tensor, "rows columns"]:
    """Of a symbol, for each tile."""
    return TileRates(stored["weight_row_rates"], stored["weight_column_rates"], stored["weight_num_ahead"]).bits()


def tiles_by_width(
    bits: Int64[Tensor, "rows columns"],
) -> Iterator[tuple[int, Int64[Tensor, " tiles"], Int64[Tensor, "tiles words"]]]:
    """Each width that occurs, the tiles that have it (counted row by row), and where their words stand."""
    widths = bits.view(-1)
    starts = WORDS_A_BIT * (widths.cumsum(0) - widths)
    for width in widths.unique().tolist():
        here = (widths == width).nonzero()[:, 0]
        yield width, here, starts[here, None] + torch.arange(WORDS_A_BIT * width, device=bits.device)
