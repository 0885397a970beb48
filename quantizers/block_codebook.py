"""Quantize block by block onto a fixed set of levels, with double-quantized scales.

The part that NormalFloat and LloydMax share: they differ in their levels alone.
"""

from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from quantizers.block_format import BlockFormat
from quantizers.block_rounding import BlockRounder
from quantizers.blocks import spread, to_blocks
from quantizers.curvature import factorize
from quantizers.double_quant import double_quantize
from quantizers.feedback import round_with_feedback
from quantizers.packing import pack
from quantizers.quantized import QuantizedTensor
from quantizers.scale_search import nearest, search_scales
from quantizers.statistics import LayerStatistics

ScaleRule = Literal["search", "absmax"]


def check_scale_rule(scale: str) -> None:
    """Raise ValueError unless `scale` is one of ScaleRule."""
    if scale not in get_args(ScaleRule):
        raise ValueError(f"scale is {scale!r}; it must be one of {', '.join(get_args(ScaleRule))}")


def quantize_blocks(
    weight: Float[Tensor, "out in"], statistics: LayerStatistics | None, form: BlockFormat, scale: ScaleRule
) -> QuantizedTensor:
    """Find the scales, round them to `scale_bits`, then give each weight the level nearest under them.

    With a curvature in `statistics` errors are passed on to the columns after them, and scales are found in between;
    else weights are rounded one by one. (Feedback between rows too makes targets that outgrow scales of few bits: a
    model came out worse by it, see LOG.md.)

    Raises:
        ValueError: `weight` has a NaN or an infinity.
    """
    weight = weight.detach().float().contiguous()
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has a NaN or an infinity; a quantizer needs finite numbers")
    shape, levels = (weight.shape[0], weight.shape[1]), form.levels.to(weight.device)
    find = partial(_scales, levels=levels, rule=scale)
    if statistics is not None and statistics.input_curvature is not None:
        inputs = factorize(statistics.input_curvature)
        rounder = BlockRounder(weight, form, inputs.pivots, find)
        round_with_feedback(weight, None, inputs, (1, form.block_size), rounder)
        return QuantizedTensor(form, shape, rounder.plain(), levels)
    blocks = to_blocks(weight, form.block_size).reshape(-1, form.block_size)
    fisher = None if statistics is None else statistics.fisher_diag
    if fisher is None and shape[1] % form.block_size:
        fisher = torch.ones_like(weight)  # and 0 for the padding, which must not count
    if fisher is not None:
        fisher = to_blocks(fisher, form.block_size).reshape(-1, form.block_size)
    scales = find(blocks, fisher)
    stored = double_quantize(scales, form.scale_bits, form.super_block)
    scales = stored.dequantize(form.scale_bits, form.super_block, len(scales)).view(shape[0], -1)
    scales = spread(scales, form.block_size, shape[1])
    codes = nearest(weight / scales.clamp_min(torch.finfo(torch.float32).tiny), levels)
    plain = {"weight_packed": pack(codes.view(-1), form.bits)} | stored.tensors()
    return QuantizedTensor(form, shape, plain, levels)


def _scales(blocks: Tensor, weights: Tensor | None, *, levels: Tensor, rule: ScaleRule) -> Tensor:
    return blocks.abs().amax(dim=1) if rule == "absmax" else search_scales(blocks, weights, levels)
