"""Trellis-coded quantization with more bits where errors count more (QTIP, arXiv:2406.11235; tile_rates.py).

Rounding with feedback leaves tiles whose errors count very differently. Where all have the same number of bits, those
that are rounded last make up much of the loss. Sharing the same bits out left 7% less divergence on text like that of
calibration in one run at 2.5 bits, and as much as before on text unlike it (BENCHMARKS.md). And the average may be any
eighth of a bit.

A million weights take 0.4 seconds, 1.2 with feedback on both sides (2.5 bits, 256 states, one thread of a CPU).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from quantizers.packing import pack
from quantizers.rotated import TINY, AbstractRotated, StoringRounder, stacked_places
from quantizers.sides import Sides
from quantizers.tile_rates import TileRates, fill_tiles
from quantizers.trellis import EncodableCheck, find_symbols, search_seconds, trellis_distortion, values_of
from quantizers.trellis_format import TILE, num_tiles
from quantizers.variable_trellis_format import WIDTHS, WORDS_A_BIT, VariableTrellisFormat, tiles_by_width

TRUST = 0.5  # exponent of what tiles count: on other text than that of calibration they count more alike


@dataclass(frozen=True)
class VariableTrellis(AbstractRotated):
    """A tail-biting path for every 16 x 16 tile of the rotated weight, of 1 to 5 bits a weight.

    Attributes:
        bits: bits a weight on average, 1 to 5 in eighths.
        state_bits: 2**state_bits states at the widths that have levels for so many; time grows with their number.
        seed: of the rotations.
    """

    bits: float
    state_bits: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.format  # raises where a setting is out of range

    @property
    def format(self) -> VariableTrellisFormat:
        """See AbstractQuantizer."""
        return VariableTrellisFormat(self.bits, self.state_bits, self.seed)

    def seconds_per_million(self, curved_sides: int) -> float:
        """See AbstractQuantizer."""
        return search_seconds(self.state_bits) + (0.5 if curved_sides else 0.2)

    @property
    def tile(self) -> tuple[int, int]:
        """See AbstractRotated."""
        return TILE, TILE

    def rates(self, sides: Sides) -> TileRates:
        """Which tile gets how many bits."""
        rows, columns = sides.tile_sums(lambda factor: factor.pivots.double())
        return fill_tiles(rows**TRUST, columns**TRUST, self.format.total_bits(sides.shape))

    @property
    def representative(self) -> "VariableTrellis":
        """See AbstractRotated."""
        return VariableTrellis(3.0, seed=self.seed)

    def distortions(self, sides: Sides) -> Float64[Tensor, "rows columns"]:
        """See AbstractRotated."""
        bits = self.rates(sides).bits()
        by_width = [trellis_distortion(width, self.format.state_bits_of(width)) for width in WIDTHS]
        return torch.tensor(by_width, dtype=torch.float64, device=bits.device)[bits - WIDTHS[0]]

    def rounder(self, root_mean_square: Float32[Tensor, ""], sides: Sides) -> StoringRounder:
        """See AbstractRotated."""
        return _VariableRounder(self.format, sides.shape, root_mean_square, self.rates(sides))


class _VariableRounder:
    """A TileRounder; `plain` gives the tensors to store once every tile is rounded."""

    def __init__(self, form: VariableTrellisFormat, shape: tuple[int, int], scale: Tensor, rates: TileRates) -> None:
        self.scale, self.rates, self.check = scale, rates, EncodableCheck()
        self.bits = rates.bits()
        self.levels = {width: form.levels_of(width, form.levels.to(scale.device)) for width in WIDTHS}
        self.symbols = torch.zeros((*num_tiles(shape), TILE * TILE), dtype=torch.uint8, device=scale.device)

    def round_tiles(
        self,
        rows: Int64[Tensor, " tiles"],
        columns: Int64[Tensor, " tiles"],
        target: Float32[Tensor, "tiles height width"],
        right: Float32[Tensor, "tiles width width"],
    ) -> Float32[Tensor, "tiles height width"]:
        """See TileRounder; there is no feedback within a tile."""
        places = stacked_places(rows, columns, target, TILE)
        widths = self.bits[places]
        tiles = (target / self.scale.clamp_min(TINY)).reshape(-1, TILE * TILE)
        self.check.add(tiles)
        symbols, values = torch.empty_like(tiles, dtype=torch.uint8), torch.empty_like(tiles)
        for width in widths.unique().tolist():
            here = widths == width
            symbols[here] = find_symbols(tiles[here], self.levels[width], width)
            values[here] = values_of(symbols[here], self.levels[width], width)
        self.symbols[places] = symbols
        return (values * self.scale).view(target.shape)

    def plain(self) -> dict[str, Tensor]:
        """The tensors of `VariableTrellisFormat.plain_specs`. Raises ValueError if a target could not be encoded."""
        self.check.end()
        symbols = self.symbols.flatten(0, 1)
        words = symbols.new_empty(WORDS_A_BIT * int(self.bits.sum()), dtype=torch.int32)
        for width, here, places in tiles_by_width(self.bits):
            words[places] = pack(symbols[here].view(-1), width).view(places.shape)
        return {
            "weight_packed": words,
            "weight_scale": self.scale.reshape(1),
            "weight_row_rates": self.rates.rows,
            "weight_column_rates": self.rates.columns,
            "weight_num_ahead": self.rates.num_ahead,
        }
