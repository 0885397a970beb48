"""Quantizers of a rotated weight: tiles of it are coded one by one, with error feedback where the curvature is known.

The rotation (incoherence processing, QuIP#, arXiv:2402.04396) makes weights normal and leaves no outliers, so such
a quantizer loses its distortion of normal numbers, whatever the weight. Feedback is two-sided as in YAQA
(arXiv:2505.22988) where both factors of the curvature are known.
"""

from abc import abstractmethod
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from quantizers.base import AbstractQuantizer, finite_float32
from quantizers.curvature import Triangular, factorize
from quantizers.feedback import TileRounder, round_with_feedback
from quantizers.quantized import QuantizedTensor
from quantizers.rotated_format import AbstractRotatedFormat
from quantizers.sides import Sides
from quantizers.statistics import LayerStatistics

MOST_GROWTH = 4.0  # beyond it feedback runs away; a larger scale would only round more coarsely
TINY = torch.finfo(torch.float32).tiny


@runtime_checkable
class StoringRounder(TileRounder, Protocol):
    """A TileRounder that says what to store once every tile is rounded."""

    def plain(self) -> dict[str, Tensor]:
        """The tensors of the format's `plain_specs`."""
        ...


class AbstractRotated(AbstractQuantizer):
    """See the module; a subclass says how a tile of about standard normal numbers is coded."""

    @property
    @abstractmethod
    def format(self) -> AbstractRotatedFormat:
        """See AbstractQuantizer."""

    @property
    @abstractmethod
    def tile(self) -> tuple[int, int]:
        """Height and width of what is rounded at one go."""

    @property
    @abstractmethod
    def representative(self) -> "AbstractRotated":
        """One quantizer for all that leave residuals of about the same spectrum, up to a factor."""

    @abstractmethod
    def distortions(self, sides: Sides) -> Float64[Tensor, "rows columns"]:
        """Mean squared error of standard normal numbers in each tile; [1, 1] where all are alike."""

    @abstractmethod
    def rounder(self, root_mean_square: Float32[Tensor, ""], sides: Sides) -> StoringRounder:
        """For a rotated weight with values of this size."""

    def quantize(self, weight: Float[Tensor, "out in"], statistics: LayerStatistics | None = None) -> QuantizedTensor:
        """See AbstractQuantizer. A Fisher diagonal has no meaning in the rotated basis and is not used."""
        weight, form = finite_float32(weight), self.format
        shape = (weight.shape[0], weight.shape[1])
        rotated = form.rotate(weight)
        sides = self.sides(shape, statistics, weight.device)
        rounder = self.rounder(_root_mean_square(rotated) * self.growth(sides) ** 0.5, sides)
        round_with_feedback(rotated, sides.outputs, sides.inputs, self.tile, rounder)
        return QuantizedTensor(form, shape, rounder.plain(), form.levels.to(weight.device))

    def growth(self, sides: Sides) -> float:
        """Mean square of what is rounded over that of the weight: a target is a weight and the errors it takes up.

        Rounding leaves E' of mean square D t w^2 in a tile of the triangular basis, D the tile's distortion, w^2 the
        weight's mean square and t the growth. In the weight's own basis these are errors E = V^-T E' U^-1, where
        entry ij of E' counts |row i of V^-1|^2 |row j of U^-1|^2 times. Targets take up E' - E, so t = 1 + t (what
        counts so, over out * in, less the mean of D).
        """
        distortions = self.distortions(sides)
        spread = sides.summed(distortions, lambda factor: factor.inverse_squares)
        own = sides.summed(distortions, lambda factor: torch.ones_like(factor.inverse_squares))
        return 1 / max(1 - (spread - own) / (sides.shape[0] * sides.shape[1]), 1 / MOST_GROWTH)

    def loss(self, sides: Sides) -> float:
        """The weighted error that rounding with feedback may be expected to leave of a weight of mean square 1."""
        return self.growth(sides) * sides.summed(self.distortions(sides), lambda factor: factor.pivots.double())

    def sides(self, shape: tuple[int, int], statistics: LayerStatistics | None, device: torch.device) -> Sides:
        """The curvature's factors in the rotated basis, in blocks of a tile: a tile is rounded at one go."""
        form, (height, width) = self.format, self.tile
        if statistics is None or statistics.input_curvature is None:
            return Sides(shape, self.tile, None, Triangular.identity(shape[1], device))
        inputs = factorize(form.rotate_curvature(statistics.input_curvature, form.seed + 1)).in_blocks(width)
        if statistics.output_curvature is None:
            return Sides(shape, self.tile, None, inputs)
        outputs = factorize(form.rotate_curvature(statistics.output_curvature, form.seed)).in_blocks(height)
        return Sides(shape, self.tile, outputs, inputs)


def stacked_places(
    rows: Tensor, columns: Tensor, target: Float32[Tensor, "tiles height width"], height: int
) -> tuple[Tensor, Tensor]:
    """Row and column of every tile of `height`, where a target holds several on top of one another."""
    stacked = target.shape[1] // height
    places = rows[:, None] * stacked + torch.arange(stacked, device=rows.device)
    return places.view(-1), columns.repeat_interleave(stacked)


def _root_mean_square(values: Tensor) -> Tensor:
    largest = values.abs().amax().clamp_min(TINY)  # so that no square over- or underflows
    return (values / largest).square().mean().sqrt() * largest
