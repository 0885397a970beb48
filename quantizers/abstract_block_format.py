"""What block formats have in common: codes of a row in blocks, each block with a double-quantized scale.

<module>.weight_packed         int32 [words]          codes, see packing.py
<module>.weight_scale_packed   int32 [words]          scale codes, see double_quant.py
<module>.weight_scale_step     float32 [super-blocks]
<module>.weight_scale_offset   float32 [1]
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from quantizers.blocks import num_blocks, spread
from quantizers.double_quant import DoubleQuantizedScales
from quantizers.format import StorageFormat, TensorSpecs
from quantizers.packing import look_up, num_words

BITS = (2, 3, 4, 5, 6, 8)
BLOCK_SIZES = (16, 32, 64, 128)
CODES_AND_SCALES = ("weight_packed", "weight_scale_packed", "weight_scale_step", "weight_scale_offset")


@dataclass(frozen=True)
class AbstractBlockFormat(StorageFormat):
    """See the module.

    Attributes:
        bits: width of a code.
        block_size: weights of a row that share a scale.
        scale_bits: width of a stored scale.
        super_block: scales that share a second-level step.
    """

    bits: int
    block_size: int
    scale_bits: int
    super_block: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}; it must be one of {BITS}")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size is {self.block_size}; it must be one of {BLOCK_SIZES}")
        if not 2 <= self.scale_bits <= 8:
            raise ValueError(f"scale_bits is {self.scale_bits}; it must be 2 to 8")
        if self.super_block < 1:
            raise ValueError(f"super_block is {self.super_block}; it must be at least 1")

    @property
    def plain_label(self) -> str:
        """See StorageFormat."""
        return f"{self.codebook_name}-g{self.block_size}-s{self.scale_bits}"

    def num_scales(self, shape: tuple[int, int]) -> int:
        """Blocks of a matrix of this shape (out, in)."""
        return shape[0] * num_blocks(shape[1], self.block_size)

    def plain_specs(self, shape: tuple[int, int]) -> TensorSpecs:
        """See StorageFormat."""
        scales = self.num_scales(shape)
        return {
            "weight_packed": ((num_words(shape[0] * shape[1], self.bits),), torch.int32),
            "weight_scale_packed": ((num_words(scales, self.scale_bits),), torch.int32),
            "weight_scale_step": ((-(-scales // self.super_block),), torch.float32),
            "weight_scale_offset": ((1,), torch.float32),
        }

    def scales(self, stored: dict[str, Tensor], shape: tuple[int, int]) -> Float32[Tensor, "out blocks"]:
        """The scale of each block."""
        packed = DoubleQuantizedScales(
            stored["weight_scale_packed"], stored["weight_scale_step"], stored["weight_scale_offset"]
        )
        scales = packed.dequantize(self.scale_bits, self.super_block, self.num_scales(shape))
        return scales.view(shape[0], num_blocks(shape[1], self.block_size))

    def scaled_levels(
        self, stored: dict[str, Tensor], shape: tuple[int, int], levels: Float32[Tensor, " levels"]
    ) -> Float32[Tensor, "out in"]:
        """levels[codes] * scale."""
        rows, columns = shape
        values = look_up(stored["weight_packed"], self.bits, rows * columns, levels).view(rows, columns)
        scales = self.scales(stored, shape)
        if columns % self.block_size == 0:
            return values.view(rows, -1, self.block_size).mul_(scales[:, :, None]).view(rows, columns)
        return values * spread(scales, self.block_size, columns)
