"""What weights can be rounded to under the parameters of their blocks."""

from dataclasses import dataclass

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from quantizers.affine_search import round_affine
from quantizers.scale_search import nearest
from quantizers.stored_scales import TINY


@dataclass(frozen=True)
class BlockGrid:
    """level[code] * scale; or, with zero-points, (code - zero) * scale.

    Attributes:
        scales, zeros: of each block.
        levels: ascending; with zero-points the codes themselves.
    """

    scales: Float32[Tensor, "out blocks 1"]
    levels: Float32[Tensor, " levels"]
    zeros: Float32[Tensor, "out blocks 1"] | None = None

    def round(
        self, weights: Float32[Tensor, "out blocks columns"]
    ) -> tuple[UInt8[Tensor, "out blocks columns"], Float32[Tensor, "out blocks columns"]]:
        """The nearest codes, and what they stand for."""
        if self.zeros is None:
            codes = nearest(weights / self.scales.clamp_min(TINY), self.levels)
            return codes, self.levels[codes.int()] * self.scales
        steps = round_affine(weights, self.scales, self.zeros, len(self.levels) - 1)
        return (steps + self.zeros).to(torch.uint8), steps * self.scales
