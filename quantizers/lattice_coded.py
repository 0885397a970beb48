"""Points of the E8 lattice for 8 weights at once (E8P of QuIP#, arXiv:2402.04396).

On standard normal numbers the squared error is 0.0915 at 2 bits, where Lloyd-Max's levels have 0.118. With 3 bits
(0.0296) and 4 (0.0084) a second point codes what the first one leaves. A million weights take 1.1, 1.1 and 1.4 seconds
at 2, 3 and 4 bits, and 0.2 to 0.3 more with a curvature of the inputs (one thread of a CPU).
"""

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64, Int64, UInt8
from torch import Tensor

from quantizers.lattice import DIMENSION, fine_encode, lattice_encode
from quantizers.lattice_format import NUM_PATTERNS, STEPS, LatticeFormat, num_vectors
from quantizers.packing import pack
from quantizers.rotated import TINY, AbstractRotated, StoringRounder, stacked_places
from quantizers.sides import Sides

# Standard normal numbers are multiplied by this before their points are looked up: by trial, as the STEPS beside them.
NORMAL_SCALES = {2: 1.03, 3: 0.97, 4: 0.91}
TILE_HEIGHT = 8  # rows that are rounded together where rows get feedback; lower ones take longer


@dataclass(frozen=True)
class LatticeCoded(AbstractRotated):
    """One point (2 bits) or two points (3 and 4 bits) for every 8 weights of a row of the rotated weight.

    Attributes:
        bits: bits a weight, 2 to 4.
        seed: of the rotations.
    """

    bits: int
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.format  # raises where a setting is out of range

    @property
    def format(self) -> LatticeFormat:
        """See AbstractQuantizer."""
        return LatticeFormat(self.bits, self.seed)

    def seconds_per_million(self, curved_sides: int) -> float:
        """See AbstractQuantizer."""
        return 1.4 if curved_sides else 1.1

    @property
    def tile(self) -> tuple[int, int]:
        """See AbstractRotated."""
        return TILE_HEIGHT, DIMENSION

    @property
    def representative(self) -> "LatticeCoded":
        """See AbstractRotated."""
        return LatticeCoded(2, seed=self.seed)

    def distortions(self, sides: Sides) -> Float64[Tensor, "rows columns"]:
        """See AbstractRotated."""
        return sides.inputs.pivots.new_full((1, 1), _distortion(self.bits), dtype=torch.float64)

    def rounder(self, root_mean_square: Float32[Tensor, ""], sides: Sides) -> StoringRounder:
        """See AbstractRotated."""
        return _LatticeRounder(self.format, sides.shape, root_mean_square / NORMAL_SCALES[self.bits])


def encode_points(vectors: Float32[Tensor, "n 8"], form: LatticeFormat) -> UInt8[Tensor, "n bytes"]:
    """The nearest first point, then the second point nearest to what is left."""
    codes = lattice_encode(vectors)
    if form.bits == 2:
        return codes
    levels = form.levels.to(vectors.device)
    only_first = LatticeFormat(2)
    first = only_first.points(codes, levels[: NUM_PATTERNS * DIMENSION])
    left = (vectors - first) / STEPS[form.bits]
    if form.bits == 4:
        return torch.cat([codes, lattice_encode(left)], dim=1)
    fine = levels.view(-1, NUM_PATTERNS, DIMENSION)[1]
    return torch.cat([codes, fine_encode(left, fine)[:, None]], dim=1)


@functools.cache
def _distortion(bits: int) -> float:
    form, scale = LatticeFormat(bits), NORMAL_SCALES[bits]
    values = torch.randn(2**14, DIMENSION, generator=torch.Generator().manual_seed(0))
    return float((values - form.points(encode_points(values * scale, form), form.levels) / scale).square().mean())


class _LatticeRounder:
    """A TileRounder; `plain` gives the tensors to store once every tile is rounded."""

    def __init__(self, form: LatticeFormat, shape: tuple[int, int], scale: Tensor) -> None:
        self.form, self.scale, self.num_rows = form, scale, shape[0]
        self.levels = form.levels.to(scale.device)
        places = (-(-shape[0] // TILE_HEIGHT), TILE_HEIGHT, num_vectors(shape[1]), form.bits)
        self.codes = torch.zeros(places, dtype=torch.uint8, device=scale.device)

    def round_tiles(
        self,
        rows: Int64[Tensor, " tiles"],
        columns: Int64[Tensor, " tiles"],
        target: Float32[Tensor, "tiles height width"],
        right: Float32[Tensor, "tiles width width"],
    ) -> Float32[Tensor, "tiles height width"]:
        """See TileRounder; there is no feedback within a tile."""
        codes = encode_points((target / self.scale.clamp_min(TINY)).reshape(-1, DIMENSION), self.form)
        values = self.form.points(codes, self.levels) * self.scale
        places, along = stacked_places(rows, columns, target, TILE_HEIGHT)
        self.codes[places, :, along] = codes.view(-1, TILE_HEIGHT, self.form.bits)
        return values.view(target.shape)

    def plain(self) -> dict[str, Tensor]:
        """The tensors of `LatticeFormat.plain_specs`."""
        codes = self.codes.flatten(0, 1)[: self.num_rows]
        return {"weight_packed": pack(codes.reshape(-1), 8), "weight_scale": self.scale.reshape(1)}
