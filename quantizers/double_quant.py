"""Double quantization: the scales of the blocks are themselves stored in few bits.

    scale = offset + code * step,   code in 0 ... 2**bits - 1,   one step for `super_block` scales

as in LQ-LoRA's code (arXiv:2311.12023; QLoRA's idea, arXiv:2305.14314): the tensor's smallest scale is
the offset, the largest of each super-block fixes its step. Stored: packed codes, one float32 step a
super-block, one float32 offset.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int32
from torch import Tensor

from quantizers.packing import look_up, pack


@dataclass(frozen=True)
class DoubleQuantizedScales:
    """Scales of one matrix, flattened row by row: packed codes, step of each super-block, offset."""

    packed: Int32[Tensor, " words"]
    steps: Float32[Tensor, " super_blocks"]
    offset: Float32[Tensor, " 1"]

    def tensors(self) -> dict[str, Tensor]:
        """Named as they are stored."""
        return {
            "weight_scale_packed": self.packed,
            "weight_scale_step": self.steps,
            "weight_scale_offset": self.offset,
        }

    def dequantize(self, bits: int, super_block: int, num_scales: int) -> Float32[Tensor, " scales"]:
        """offset + code * step."""
        codes = look_up(self.packed, bits, num_scales, torch.arange(2.0**bits, device=self.packed.device))
        steps = self.steps.repeat_interleave(min(super_block, num_scales))[:num_scales]
        return torch.addcmul(self.offset, codes, steps)


def double_quantize(scales: Float32[Tensor, " scales"], bits: int, super_block: int) -> DoubleQuantizedScales:
    """Quantize non-negative `scales`, each to the nearest of its super-block's 2**bits values."""
    offset = scales.min().reshape(1)
    above = torch.nn.functional.pad(scales - offset, (0, -len(scales) % super_block)).view(-1, super_block)
    steps = above.amax(dim=1) / (2**bits - 1)
    codes = (above / steps.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().clamp_(0, 2**bits - 1)
    packed = pack(codes.to(torch.uint8).view(-1)[: len(scales)], bits)
    return DoubleQuantizedScales(packed, steps, offset)
