"""Blocks of a row with integer levels, a scale and a zero-point: W ~ (code - zero) * scale.

    <module>.weight_zero_packed   int32 [words]   zero-point of each block, `bits` bits, see packing.py

beside the tensors of abstract_block_format.py. Zero is always a level, since the zero-point is a code.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float32
from torch import Tensor

from quantizers.abstract_block_format import CODES_AND_SCALES, AbstractBlockFormat
from quantizers.blocks import num_blocks, spread
from quantizers.format import TensorSpecs
from quantizers.packing import look_up, num_words


@dataclass(frozen=True)
class IntegerFormat(AbstractBlockFormat):
    """See the module.

    Attributes:
        bits: width of a code, and of a zero-point.
        block_size, scale_bits, super_block: see AbstractBlockFormat.
    """

    kind: ClassVar[str] = "integer"
    plain_names: ClassVar[tuple[str, ...]] = (*CODES_AND_SCALES, "weight_zero_packed")

    @property
    def codebook_name(self) -> str:
        """See StorageFormat."""
        return f"int{self.bits}"

    @property
    def levels(self) -> Float32[Tensor, " levels"]:
        """0 ... 2**bits - 1."""
        return torch.arange(2**self.bits, dtype=torch.float32, device="cpu")

    @property
    def meaning(self) -> str:
        """See StorageFormat."""
        return f"{self.bits}-bit integers with zero-points, groups of {self.block_size}, {self.scale_bits}-bit scales"

    def plain_specs(self, shape: tuple[int, int]) -> TensorSpecs:
        """See StorageFormat."""
        zeros = ((num_words(self.num_scales(shape), self.bits),), torch.int32)
        return super().plain_specs(shape) | {"weight_zero_packed": zeros}

    def decode(
        self, stored: dict[str, Tensor], shape: tuple[int, int], levels: Float32[Tensor, " levels"]
    ) -> Float32[Tensor, "out in"]:
        """(code - zero) * scale."""
        rows, columns = shape
        codes = look_up(stored["weight_packed"], self.bits, rows * columns, levels).view(rows, columns)
        zeros = spread(self.zeros(stored, shape), self.block_size, columns)
        return (codes - zeros) * spread(self.scales(stored, shape), self.block_size, columns)

    def zeros(self, stored: dict[str, Tensor], shape: tuple[int, int]) -> Float32[Tensor, "out blocks"]:
        """The zero-point of each block."""
        packed = stored["weight_zero_packed"]
        zeros = look_up(packed, self.bits, self.num_scales(shape), self.levels.to(packed.device))
        return zeros.view(shape[0], num_blocks(shape[1], self.block_size))
