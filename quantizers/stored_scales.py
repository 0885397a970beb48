"""Double-quantized scales whose codes are filled in block by block.

The second level (offset and steps, see double_quant.py) has to be known before the first block is rounded: it is
that of the scales that the weight itself asks for, before any feedback.
"""

import copy
from types import EllipsisType

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from quantizers.abstract_block_format import AbstractBlockFormat
from quantizers.double_quant import double_quantize
from quantizers.packing import pack

TINY = torch.finfo(torch.float32).tiny
# Where some blocks stand in [out, blocks]: all, or rows and columns of blocks that broadcast to [rows, tiles].
Places = EllipsisType | tuple[Int64[Tensor, "rows tiles"], Int64[Tensor, " tiles"]]


class StoredScales:
    """Scales of all blocks, 0 bits of them decided; `first` sets offset and steps."""

    def __init__(self, first: Float32[Tensor, "out blocks"], form: AbstractBlockFormat) -> None:
        self.scale_bits = form.scale_bits
        self.second = double_quantize(first.reshape(-1), form.scale_bits, form.super_block)
        steps = self.second.steps.repeat_interleave(form.super_block)[: first.numel()]
        self.steps = steps.view(first.shape)
        self.codes = torch.zeros_like(self.steps, dtype=torch.uint8)

    def rows(self, rows: slice) -> "StoredScales":
        """Those of some rows, in this one's memory."""
        part = copy.copy(self)
        part.steps, part.codes = self.steps[rows], self.codes[rows]
        return part

    def store(self, places: Places, found: Float32[Tensor, "rows tiles"]) -> Float32[Tensor, "rows tiles"]:
        """Round the scales of some blocks to ones that can be stored, and return these."""
        steps = self.steps[places]
        codes = ((found - self.second.offset) / steps.clamp_min(TINY)).round_().clamp_(0, 2**self.scale_bits - 1)
        self.codes[places] = codes.to(torch.uint8)
        return torch.addcmul(self.second.offset, codes, steps)

    def tensors(self) -> dict[str, Tensor]:
        """Named as they are stored."""
        packed = {"weight_scale_packed": pack(self.codes.view(-1), self.scale_bits)}
        return self.second.tensors() | packed
