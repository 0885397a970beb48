"""The order in which rows and columns are rounded: first what the loss heeds most, so that the others make up for it.

GPTQ's act-order (`desc_act`) rounds columns by falling diagonal of H_I, across the blocks that share a scale, and then
either stores the order or finds scales before the errors are known. Here whole blocks are ordered, and the columns of
each: nothing has to be stored, scales are found when their block's turn comes, and most of the gain is kept (LOG.md).
Rows share nothing, so each has its place by the diagonal of H_O alone.
"""

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from quantizers.curvature import Triangular, factorize


@dataclass(frozen=True)
class RoundingOrder:
    """The order of one side of a weight, and the factor of its curvature with rows and columns so ordered.

    Attributes:
        places: a block's stand together; a last block with fewer than the others stays last.
        factor: in that order.
    """

    places: Int64[Tensor, " n"]
    factor: Triangular

    @functools.cached_property
    def pivots(self) -> Float32[Tensor, " n"]:
        """Of the factor, each at its own place."""
        return torch.empty_like(self.factor.pivots).scatter_(0, self.places, self.factor.pivots)

    def in_blocks(self, size: int) -> "RoundingOrder":
        """For what is rounded at one go, see Triangular."""
        return RoundingOrder(self.places, self.factor.in_blocks(size)) if size > 1 else self


def rounding_order(curvature: Float[Tensor, "n n"], block_size: int) -> RoundingOrder:
    """Blocks by falling mean of the curvature's diagonal, the places in a block by falling diagonal."""
    diagonal = curvature.diagonal().nan_to_num()
    size = len(diagonal)
    num_whole = size // block_size
    whole = diagonal[: num_whole * block_size].view(num_whole, block_size)
    blocks = whole.mean(dim=1).argsort(descending=True, stable=True)
    within = whole.argsort(dim=1, descending=True, stable=True) + block_size * torch.arange(
        num_whole, device=diagonal.device
    ).unsqueeze(1)
    rest = num_whole * block_size + diagonal[num_whole * block_size :].argsort(descending=True, stable=True)
    places = torch.cat([within[blocks].view(-1), rest])
    return RoundingOrder(places, factorize(curvature[places][:, places]))
