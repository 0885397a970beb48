"""A matrix of a block format as the kernels read it: codes in planes (layout.py), scales in bytes.

Scales stay double-quantized, one byte a block beside the stored steps and offset: a float32 scale would be exact, too,
but adds 2 bits a weight in blocks of 16, a float16 one is neither exact nor smaller than a byte, and the decoding is
one multiply-add a block. Against the dense packing, codes take the same bits but for the padding of rows to 256
columns, a scale of fewer than 8 bits takes 8, and so does a zero-point; levels, steps and offset are shared.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float32, Int32, Int64, Integer, UInt8
from torch import Tensor

from quantizers.abstract_block_format import AbstractBlockFormat
from quantizers.blocks import num_blocks, spread
from quantizers.kernels.abstract_weight import MOST_FUSED_ROWS, AbstractKernelWeight, KernelFactors
from quantizers.kernels.layout import from_planes, to_planes
from quantizers.packing import WORD_BITS, num_words, pack, unpack

CODES_AT_ONCE = 2**24


@dataclass(frozen=True)
class BlockWeight(AbstractKernelWeight):
    """See the module.

    Attributes:
        planes: see layout.py.
        scale_codes: of the scale of each block.
        steps, offset: second level of the scales, see double_quant.py.
        zeros: zero-point of each block, where the format has them; then a level is its code.
        levels: of the codebook, or 0 ... 2**bits - 1.
    """

    replaces: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale_packed", "weight_zero_packed")
    form: AbstractBlockFormat
    shape: tuple[int, int]
    planes: tuple[Integer[Tensor, "out super _ lane"], ...]
    scale_codes: UInt8[Tensor, "out blocks"]
    steps: Float32[Tensor, " super_blocks"]
    offset: Float32[Tensor, " 1"]
    zeros: UInt8[Tensor, "out blocks"] | None
    levels: Float32[Tensor, " levels"]

    @staticmethod
    def from_stored(
        form: AbstractBlockFormat, shape: tuple[int, int], stored: dict[str, Tensor], levels: Tensor
    ) -> "BlockWeight":
        """See AbstractKernelWeight; `levels` are replaced by the matrix's own, where it stores them."""
        rows, columns = shape
        blocks = (rows, num_blocks(columns, form.block_size))
        count = form.num_scales(shape)
        zeros = stored.get("weight_zero_packed")
        own_levels = stored.get("weight_levels")
        return BlockWeight(
            form,
            shape,
            _planes(stored["weight_packed"], form.bits, shape),
            unpack(stored["weight_scale_packed"], form.scale_bits, count).view(blocks),
            stored["weight_scale_step"],
            stored["weight_scale_offset"],
            None if zeros is None else unpack(zeros, form.bits, count).view(blocks),
            levels if own_levels is None else own_levels.float(),
        )

    def stored(self) -> dict[str, Tensor]:
        """See AbstractKernelWeight."""
        bits = self.form.bits
        packed = {
            "weight_packed": _words(self.planes, bits, self.shape[1]),
            "weight_scale_packed": pack(self.scale_codes.view(-1), self.form.scale_bits),
        }
        if self.zeros is not None:
            packed["weight_zero_packed"] = pack(self.zeros.view(-1), bits)
        return packed

    def pointers(self) -> tuple[Tensor, ...]:
        """Planes, levels, scale codes, steps, offset and zero-points, as all kernels take them.

        What a matrix lacks is replaced by something that is never read.
        """
        zeros = self.scale_codes if self.zeros is None else self.zeros
        return (self.planes[0], self.planes[-1], self.levels, self.scale_codes, self.steps, self.offset, zeros)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """See AbstractKernelWeight."""
        from quantizers.kernels.dequantize import dequantize

        return dequantize(self, dtype)

    def rows(self, numbers: Int64[Tensor, " some"]) -> Float32[Tensor, "some in"]:
        """These rows of Q by torch, in any order and as often as they are named."""
        form, columns = self.form, self.shape[1]
        codes = from_planes(tuple(plane.index_select(0, numbers) for plane in self.planes), form.bits, columns)
        values = self.levels[codes.int()]
        if self.zeros is not None:
            values = values - spread(self.zeros[numbers].float(), form.block_size, columns)
        blocks = numbers[:, None] * self.scale_codes.shape[1] + torch.arange(
            self.scale_codes.shape[1], device=numbers.device
        )
        steps = self.steps[blocks // form.super_block]
        scales = torch.addcmul(self.offset, self.scale_codes[numbers].float(), steps)
        return values * spread(scales, form.block_size, columns)

    def product(self, x: Float[Tensor, "rows in"], factors: KernelFactors | None = None) -> Float[Tensor, "rows out"]:
        """See AbstractKernelWeight."""
        from quantizers.kernels.matmul import matmul
        from quantizers.kernels.matvec import matvec

        if x.shape[0] > MOST_FUSED_ROWS:
            y = torch.nn.functional.linear(x, self.dense(x.dtype))
            return y if factors is None else y + factors.product(x)
        return (matvec if x.shape[0] == 1 else matmul)(x, self, factors)


def _some_rows(num_columns: int) -> int:
    """Rows whose codes are unpacked at once: whole words, and never all codes of a head."""
    return WORD_BITS * max(1, CODES_AT_ONCE // (WORD_BITS * num_columns))


def _planes(
    words: Int32[Tensor, " words"], bits: int, shape: tuple[int, int]
) -> tuple[Integer[Tensor, "out super _ lane"], ...]:
    """Of the dense packing."""
    rows, columns = shape
    parts = []
    for start in range(0, rows, _some_rows(columns)):
        count = min(_some_rows(columns), rows - start)
        some = words[start * columns * bits // WORD_BITS :][: num_words(count * columns, bits)]
        parts.append(to_planes(unpack(some, bits, count * columns).view(count, columns), bits))
    return tuple(torch.cat(plane) for plane in zip(*parts, strict=True))


def _words(
    planes: tuple[Integer[Tensor, "out super _ lane"], ...], bits: int, num_columns: int
) -> Int32[Tensor, " words"]:
    """The dense packing again."""
    parts = zip(*(plane.split(_some_rows(num_columns)) for plane in planes), strict=True)
    return torch.cat([pack(from_planes(some, bits, num_columns).view(-1), bits) for some in parts])
