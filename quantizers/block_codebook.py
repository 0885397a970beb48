"""Quantize block by block onto a fixed set of levels, with double-quantized scales.

The part that NormalFloat and LloydMax share: they differ in their levels alone.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from quantizers.block_format import BlockFormat
from quantizers.blocks import spread, to_blocks
from quantizers.double_quant import double_quantize
from quantizers.packing import pack
from quantizers.quantized import QuantizedTensor
from quantizers.scale_search import TYPICAL_MULTIPLES, level_of, nearest, search_scales
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

    Raises:
        ValueError: `weight` has a NaN or an infinity.
    """
    weight = weight.detach().float().contiguous()
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has a NaN or an infinity; a quantizer needs finite numbers")
    rows, columns = weight.shape
    levels = form.levels.to(weight.device)
    blocks = to_blocks(weight, form.block_size).reshape(-1, form.block_size)
    if scale == "absmax":
        scales = blocks.abs().amax(dim=1)
    else:
        fisher = None if statistics is None else statistics.fisher_diag
        if fisher is None and columns % form.block_size:
            fisher = torch.ones_like(weight)  # and 0 for the padding, which must not count
        if fisher is not None:
            fisher = to_blocks(fisher, form.block_size).reshape(-1, form.block_size)
        scales = search_scales(blocks, fisher, levels)
    stored = double_quantize(scales, form.scale_bits, form.super_block)
    scales = stored.dequantize(form.scale_bits, form.super_block, len(scales)).view(rows, -1)
    scales = spread(scales, form.block_size, columns)
    codes = nearest(weight / scales.clamp_min(torch.finfo(torch.float32).tiny), levels)
    plain = {"weight_packed": pack(codes.view(-1), form.bits)} | stored.tensors()
    return QuantizedTensor(form, (rows, columns), plain, levels)


def quantize_quickly(weight: Float[Tensor, "out in"], form: BlockFormat) -> Float[Tensor, "out in"]:
    """Roughly what `quantize_blocks` dequantizes to, many times faster: a fixed multiple of the maximum.

    Good for what depends on the residual's large features only, such as its leading singular vectors.
    """
    levels = form.levels.to(weight.device)
    blocks = to_blocks(weight.float(), form.block_size)
    scales = blocks.abs().amax(dim=2) * TYPICAL_MULTIPLES.get(form.bits, 1.0)
    return (level_of(blocks.flatten(0, 1), scales.flatten(), levels) * scales.view(-1, 1)).view(weight.shape[0], -1)[
        :, : weight.shape[1]
    ]
