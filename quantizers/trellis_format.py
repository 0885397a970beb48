"""A rotated weight in tiles of 16 x 16, each a tail-biting path through a trellis.

    <module>.weight_packed    int32 [words]    symbols of `bits` bits, tile by tile (row of tiles by row of tiles)
    <module>.weight_scale     float32 [1]      what the levels are multiplied by

    Q = R_out (scale * levels[states]) R_in^T,   R as in rotated_format.py

Where a side is no multiple of 16, the last tiles are padded, and the padding is stored.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from quantizers.compiled import decoded_tiles, tile_product
from quantizers.format import TensorSpecs
from quantizers.packing import num_words, unpack
from quantizers.rotated_format import AbstractRotatedFormat
from quantizers.trellis import decode, trellis_levels

TILE = 16


@dataclass(frozen=True)
class TrellisFormat(AbstractRotatedFormat):
    """See the module.

    Attributes:
        bits: of a symbol, 1 to 5.
        state_bits: of a state, which is a window over the latest symbols.
        seed: of the rotations.
    """

    kind: ClassVar[str] = "trellis"
    plain_names: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    bits: int
    state_bits: int
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = trellis_levels(self.bits, self.state_bits)  # raises where there are none

    @property
    def plain_label(self) -> str:
        """See StorageFormat."""
        return f"trellis{self.bits}-l{self.state_bits}"

    @property
    def codebook_name(self) -> str:
        """See StorageFormat."""
        return f"trellis{self.bits}-l{self.state_bits}"

    @property
    def levels(self) -> Float32[Tensor, " states"]:
        """The level of each of the 2**state_bits states, for standard normal values."""
        return trellis_levels(self.bits, self.state_bits)

    @property
    def meaning(self) -> str:
        """See StorageFormat."""
        return f"{self.bits} bits, rotated and trellis-coded with {2**self.state_bits} states"

    def plain_specs(self, shape: tuple[int, int]) -> TensorSpecs:
        """See StorageFormat."""
        rows, columns = num_tiles(shape)
        return {
            "weight_packed": ((num_words(rows * columns * TILE * TILE, self.bits),), torch.int32),
            "weight_scale": ((1,), torch.float32),
        }

    def decode_rotated(
        self, stored: dict[str, Tensor], shape: tuple[int, int], levels: Float32[Tensor, " states"]
    ) -> Float32[Tensor, "out in"]:
        """See AbstractRotatedFormat."""
        found = decoded_tiles(*self._tiles(stored, shape, levels))
        if found is not None:
            return found
        rows, columns = num_tiles(shape)
        symbols = unpack(stored["weight_packed"], self.bits, rows * columns * TILE * TILE)
        tiles = decode(symbols.view(-1, TILE * TILE), levels, self.bits) * stored["weight_scale"]
        return from_tiles(tiles.view(rows, columns, TILE, TILE))[: shape[0], : shape[1]]

    def rotated_product(
        self,
        x: Float[Tensor, "... in"],
        stored: dict[str, Tensor],
        shape: tuple[int, int],
        levels: Float32[Tensor, " states"],
    ) -> Float[Tensor, "... out"]:
        """See AbstractRotatedFormat."""
        found = tile_product(x, *self._tiles(stored, shape, levels))
        return super().rotated_product(x, stored, shape, levels) if found is None else found

    def _tiles(
        self, stored: dict[str, Tensor], shape: tuple[int, int], levels: Tensor
    ) -> tuple[Tensor, Tensor, dict[int, int], Tensor, Tensor, tuple[int, int]]:
        """What compiled.py asks for."""
        tile_bits = torch.full(num_tiles(shape), self.bits, device=levels.device)
        return stored["weight_packed"], tile_bits, {self.bits: self.state_bits}, levels, stored["weight_scale"], shape


def num_tiles(shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles of a matrix."""
    return -(-shape[0] // TILE), -(-shape[1] // TILE)


def from_tiles(tiles: Float32[Tensor, "rows columns height width"]) -> Float32[Tensor, "out in"]:
    """Tiles in their places, the padding included."""
    rows, columns, height, width = tiles.shape
    return tiles.transpose(1, 2).reshape(rows * height, columns * width)
