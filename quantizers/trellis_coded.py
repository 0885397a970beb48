"""Trellis-coded quantization of the rotated weight (QTIP, arXiv:2406.11235).

Per weight the trellis comes within a few percent of the best that any code of its rate can do, where a scalar
codebook loses a quarter of a bit. A million weights take 0.2 seconds, 0.8 with feedback on both sides, and 1.1
and 2.2 with 4096 states (3 bits, one thread of an AVX2 core); without numba 1.9, 6.8, 6.5 and 12.6 seconds.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from quantizers.packing import pack
from quantizers.rotated import TINY, AbstractRotated, StoringRounder, stacked_places
from quantizers.sides import Sides
from quantizers.trellis import EncodableCheck, find_symbols, search_seconds, trellis_distortion, values_of
from quantizers.trellis_format import TILE, TrellisFormat, num_tiles


@dataclass(frozen=True)
class TrellisCoded(AbstractRotated):
    """A tail-biting path through a trellis for every 16 x 16 tile of the rotated weight.

    Attributes:
        bits: bits a weight, 1 to 5.
        state_bits: 2**state_bits states; time grows with their number, the error falls a little.
        seed: of the rotations.
    """

    bits: int
    state_bits: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.format  # raises where a setting is out of range

    @property
    def format(self) -> TrellisFormat:
        """See AbstractQuantizer."""
        return TrellisFormat(self.bits, self.state_bits, self.seed)

    def seconds_per_million(self, curved_sides: int) -> float:
        """See AbstractQuantizer."""
        return search_seconds(self.state_bits) + (0.4 if curved_sides else 0.15)

    @property
    def tile(self) -> tuple[int, int]:
        """See AbstractRotated."""
        return TILE, TILE

    @property
    def representative(self) -> "TrellisCoded":
        """See AbstractRotated."""
        return TrellisCoded(2, seed=self.seed)

    def distortions(self, sides: Sides) -> Float64[Tensor, "rows columns"]:
        """See AbstractRotated."""
        return sides.inputs.pivots.new_full((1, 1), trellis_distortion(self.bits, self.state_bits), dtype=torch.float64)

    def rounder(self, root_mean_square: Float32[Tensor, ""], sides: Sides) -> StoringRounder:
        """See AbstractRotated."""
        return _TrellisRounder(self.format, sides.shape, root_mean_square)


class _TrellisRounder:
    """A TileRounder; `plain` gives the tensors to store once every tile is rounded."""

    def __init__(self, form: TrellisFormat, shape: tuple[int, int], scale: Tensor) -> None:
        self.form, self.scale = form, scale
        self.levels, self.check = form.levels.to(scale.device), EncodableCheck()
        self.symbols = torch.zeros((*num_tiles(shape), TILE * TILE), dtype=torch.uint8, device=scale.device)

    def round_tiles(
        self,
        rows: Int64[Tensor, " tiles"],
        columns: Int64[Tensor, " tiles"],
        target: Float32[Tensor, "tiles height width"],
        right: Float32[Tensor, "tiles width width"],
    ) -> Float32[Tensor, "tiles height width"]:
        """See TileRounder; there is no feedback within a tile."""
        tiles = (target / self.scale.clamp_min(TINY)).reshape(-1, TILE * TILE)
        self.check.add(tiles)
        symbols = find_symbols(tiles, self.levels, self.form.bits)
        values = values_of(symbols, self.levels, self.form.bits) * self.scale
        self.symbols[stacked_places(rows, columns, target, TILE)] = symbols
        return values.view(target.shape)

    def plain(self) -> dict[str, Tensor]:
        """The tensors of `TrellisFormat.plain_specs`. Raises ValueError if a target could not be encoded."""
        self.check.end()
        return {
            "weight_packed": pack(self.symbols.view(-1), self.form.bits),
            "weight_scale": self.scale.reshape(1),
        }
