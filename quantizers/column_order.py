"""The order in which columns are rounded: what the loss heeds most comes first, so that the others make up for it.

GPTQ's act-order (`desc_act`) rounds columns by falling diagonal of H_I, across the blocks that share a scale, and then
either stores the order or finds scales before the errors are known. Here whole blocks are ordered, and the columns of
each: nothing has to be stored, scales are found when their block's turn comes, and most of the gain is kept (LOG.md).
"""

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from quantizers.curvature import Triangular, factorize


@dataclass(frozen=True)
class OrderedColumns:
    """Columns in the order in which they are rounded, and the factor of H_I with its rows and columns so ordered.

    Attributes:
        columns: a block's columns stand together; a last block with fewer columns than the others stays last.
        factor: in that order.
    """

    columns: Int64[Tensor, " in"]
    factor: Triangular

    @functools.cached_property
    def pivots(self) -> Float32[Tensor, " in"]:
        """Of the factor, each at its column's own place."""
        return torch.empty_like(self.factor.pivots).scatter_(0, self.columns, self.factor.pivots)


def order_columns(curvature: Float[Tensor, "in in"], block_size: int) -> OrderedColumns:
    """Blocks by falling mean of the diagonal of H_I, columns of a block by falling diagonal."""
    diagonal = curvature.diagonal().nan_to_num()
    size = len(diagonal)
    num_whole = size // block_size
    whole = diagonal[: num_whole * block_size].view(num_whole, block_size)
    blocks = whole.mean(dim=1).argsort(descending=True, stable=True)
    within = whole.argsort(dim=1, descending=True, stable=True) + block_size * torch.arange(
        num_whole, device=diagonal.device
    ).unsqueeze(1)
    rest = num_whole * block_size + diagonal[num_whole * block_size :].argsort(descending=True, stable=True)
    columns = torch.cat([within[blocks].view(-1), rest])
    return OrderedColumns(columns, factorize(curvature[columns][:, columns]))
