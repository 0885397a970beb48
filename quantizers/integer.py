"""Integers with a zero-point for each block, W ~ (code - zero) * scale: the grid that fast kernels know.

The grid of GPTQ (arXiv:2210.17323) and AWQ (arXiv:2306.00978), with scales that are searched and stored in few bits.
Uniform levels suit normal weights less than Lloyd-Max's do, most of all at 2 bits; a zero-point follows blocks
whose weights lean to one side. A million weights take 0.1 seconds, 0.5 with feedback from column to column, 1.7 with
both sides (3 bits, one thread of a CPU).
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from quantizers.affine_search import search_affine
from quantizers.base import AbstractQuantizer, finite_float32
from quantizers.block_grid import BlockGrid
from quantizers.block_rounding import metric_of, round_blocks
from quantizers.integer_format import IntegerFormat
from quantizers.packing import pack
from quantizers.quantized import QuantizedTensor
from quantizers.statistics import LayerStatistics
from quantizers.stored_scales import Places, StoredScales


@dataclass(frozen=True)
class Integer(AbstractQuantizer):
    """Uniform levels, a scale and a zero-point a block.

    Attributes:
        bits: width of a code and of a zero-point.
        block_size: weights of a row that share a scale.
        scale_bits: width of a stored scale.
        super_block: scales that share a second-level step.
    """

    bits: int
    block_size: int = 64
    scale_bits: int = 8
    super_block: int = 256

    def __post_init__(self) -> None:
        _ = self.format  # raises where a setting is out of range

    @property
    def format(self) -> IntegerFormat:
        """See AbstractQuantizer."""
        return IntegerFormat(self.bits, self.block_size, self.scale_bits, self.super_block)

    def seconds_per_million(self, curved_sides: int) -> float:
        """See AbstractQuantizer."""
        return (0.1, 0.5, 1.7)[curved_sides]

    def quantize(self, weight: Float[Tensor, "out in"], statistics: LayerStatistics | None = None) -> QuantizedTensor:
        """See AbstractQuantizer."""
        weight, form = finite_float32(weight), self.format
        find = partial(search_affine, bits=self.bits)
        plain = round_blocks(
            weight, metric_of(statistics, form.block_size), form, find, lambda first: _IntegerParameters(first, form)
        )
        return QuantizedTensor(form, (weight.shape[0], weight.shape[1]), plain, form.levels.to(weight.device))


class _IntegerParameters:
    """BlockParameters: a scale and a zero-point for each block."""

    def __init__(self, first: Float32[Tensor, "out blocks 2"], form: IntegerFormat) -> None:
        self.scales, self.bits = StoredScales(first[:, :, 0], form), form.bits
        self.zeros = torch.zeros_like(self.scales.codes)

    def store(self, places: Places, found: Float32[Tensor, "rows tiles 2"]) -> BlockGrid:
        """See BlockParameters."""
        scales = self.scales.store(places, found[:, :, 0])[:, :, None]
        zeros = found[:, :, 1:]
        self.zeros[places] = zeros[:, :, 0].to(torch.uint8)
        codes = torch.arange(2**self.bits, dtype=torch.float32, device=scales.device)
        return BlockGrid(scales, codes, zeros)

    def tensors(self) -> dict[str, Tensor]:
        """See BlockParameters."""
        return self.scales.tensors() | {"weight_zero_packed": pack(self.zeros.view(-1), self.bits)}
