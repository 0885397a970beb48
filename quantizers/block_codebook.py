"""Quantize block by block onto levels, with double-quantized scales.

The part that NormalFloat, LloydMax and KMeans share: they differ in where their levels come from.
"""

import copy
from functools import partial
from typing import Literal, get_args

from jaxtyping import Float, Float32
from torch import Tensor

from quantizers.abstract_block_format import AbstractBlockFormat
from quantizers.base import finite_float32
from quantizers.block_format import BlockFormat
from quantizers.block_grid import BlockGrid
from quantizers.block_rounding import Metric, metric_of, round_blocks
from quantizers.quantized import QuantizedTensor
from quantizers.scale_search import search_scales
from quantizers.statistics import LayerStatistics
from quantizers.stored_scales import Places, StoredScales

ScaleRule = Literal["search", "absmax"]


def check_scale_rule(scale: str) -> None:
    """Raise ValueError unless `scale` is one of ScaleRule."""
    if scale not in get_args(ScaleRule):
        raise ValueError(f"scale is {scale!r}; it must be one of {', '.join(get_args(ScaleRule))}")


def quantize_blocks(
    weight: Float[Tensor, "out in"], statistics: LayerStatistics | None, form: BlockFormat, scale: ScaleRule
) -> QuantizedTensor:
    """Find the scales, round them to `scale_bits`, then give each weight the level nearest under them.

    With a curvature in `statistics` errors are passed on to the columns and rows after them, and scales are found in
    between; else weights are rounded one by one.

    Raises:
        ValueError: `weight` has a NaN or an infinity.
    """
    weight = finite_float32(weight)
    levels = form.levels.to(weight.device)
    plain = round_onto_levels(weight, metric_of(statistics, form.block_size), form, levels, scale)
    return QuantizedTensor(form, (weight.shape[0], weight.shape[1]), plain, levels)


def round_onto_levels(
    weight: Float32[Tensor, "out in"],
    metric: Metric,
    form: AbstractBlockFormat,
    levels: Float32[Tensor, " levels"],
    scale: ScaleRule = "search",
) -> dict[str, Tensor]:
    """Codes and scales as they are stored."""
    find = partial(block_scales, levels=levels, rule=scale)
    return round_blocks(weight, metric, form, find, lambda first: CodebookParameters(first, form, levels))


def block_scales(
    blocks: Tensor, weights: Tensor | None, *, levels: Tensor, rule: ScaleRule
) -> Float32[Tensor, "blocks 1"]:
    """What each block asks for, under the importance of its weights (None: all alike)."""
    scales = blocks.abs().amax(dim=1) if rule == "absmax" else search_scales(blocks, weights, levels)
    return scales[:, None]


class CodebookParameters:
    """BlockParameters: a scale for each block."""

    def __init__(
        self,
        first: Float32[Tensor, "out blocks 1"],
        form: AbstractBlockFormat,
        levels: Float32[Tensor, " levels"],
    ) -> None:
        self.scales, self.levels = StoredScales(first[:, :, 0], form), levels

    def rows(self, rows: slice) -> "CodebookParameters":
        """Those of some rows, in this one's memory."""
        part = copy.copy(self)
        part.scales = self.scales.rows(rows)
        return part

    def store(self, places: Places, found: Float32[Tensor, "rows tiles 1"]) -> BlockGrid:
        """See BlockParameters."""
        return BlockGrid(self.scales.store(places, found[:, :, 0])[:, :, None], self.levels)

    def tensors(self) -> dict[str, Tensor]:
        """See BlockParameters."""
        return self.scales.tensors()
