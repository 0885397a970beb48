"""A quantized weight: W ~ levels[codes] * scale + L1 L2."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import BFloat16, Float, Float32, Int32
from torch import Tensor

from quantizers.blocks import num_blocks, spread
from quantizers.double_quant import DoubleQuantizedScales
from quantizers.format import StorageFormat
from quantizers.packing import look_up


@dataclass(frozen=True)
class LowRank:
    """L1 [out, rank] and L2 [rank, in], as they are stored."""

    out: BFloat16[Tensor, "out rank"]
    into: BFloat16[Tensor, "rank in"]

    def product(self) -> Float32[Tensor, "out in"]:
        """L1 L2 in float32."""
        return self.out.float() @ self.into.float()


@dataclass(frozen=True)
class QuantizedTensor:
    """One quantized weight of shape (out, in); `low_rank` is there if `format.rank` is above 0."""

    format: StorageFormat
    shape: tuple[int, int]
    packed: Int32[Tensor, " words"]
    scales: DoubleQuantizedScales
    levels: Float32[Tensor, " levels"]
    low_rank: LowRank | None = None

    def quantized_part(self) -> Float32[Tensor, "out in"]:
        """Q: levels[codes] * scale, in float32."""
        rows, columns = self.shape
        form = self.format
        values = look_up(self.packed, form.bits, rows * columns, self.levels).view(rows, columns)
        scales = self.scales.dequantize(form.scale_bits, form.super_block, form.num_scales(self.shape))
        scales = scales.view(rows, num_blocks(columns, form.block_size))
        if columns % form.block_size == 0:
            return values.view(rows, -1, form.block_size).mul_(scales[:, :, None]).view(rows, columns)
        return values * spread(scales, form.block_size, columns)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """Q + L1 L2, computed in float32."""
        weight = self.quantized_part()
        if self.low_rank is not None:
            weight = weight + self.low_rank.product()
        return weight.to(dtype)

    def with_low_rank(self, low_rank: LowRank) -> "QuantizedTensor":
        """The same codes with other factors."""
        return replace(self, format=replace(self.format, rank=low_rank.out.shape[1]), low_rank=low_rank)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, named as in `StorageFormat.tensor_specs`."""
        stored: dict[str, Tensor] = {
            "weight_packed": self.packed,
            "weight_scale_packed": self.scales.packed,
            "weight_scale_step": self.scales.steps,
            "weight_scale_offset": self.scales.offset,
        }
        if self.low_rank is not None:
            stored |= {"low_rank_out": self.low_rank.out, "low_rank_in": self.low_rank.into}
        return stored

    @staticmethod
    def from_tensors(
        form: StorageFormat,
        shape: tuple[int, int],
        levels: Float32[Tensor, " levels"],
        stored: dict[str, Tensor],
    ) -> "QuantizedTensor":
        """Undo `tensors`."""
        scales = DoubleQuantizedScales(
            stored["weight_scale_packed"], stored["weight_scale_step"], stored["weight_scale_offset"]
        )
        low_rank = LowRank(stored["low_rank_out"], stored["low_rank_in"]) if form.rank else None
        return QuantizedTensor(form, shape, stored["weight_packed"], scales, levels, low_rank)

    @property
    def size_bits(self) -> int:
        """Bits of all stored tensors."""
        return sum(8 * tensor.numel() * tensor.element_size() for tensor in self.tensors().values())
