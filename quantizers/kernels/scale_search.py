"""The search of quantizers/scale_search.py with some blocks a program, which stay in registers through all trials."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32
from torch import Tensor

from quantizers.kernels.configs import config_of

# Triton 3.6 takes numbers below float32's least normal one for float64, and all that they meet becomes float64.
LEAST_NORM = tl.constexpr(1.2e-38)


@triton.jit
@no_type_check
def scale_search_kernel(
    scales,
    blocks,
    weights,
    table,
    multiples,
    num_blocks,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BINS: tl.constexpr,
    SMALLEST: tl.constexpr,
    TRIALS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """scales is [num_blocks]; blocks and weights are [num_blocks, SIZE]; table is [BINS], multiples [TRIALS]."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, PADDED)[None, :]
    there = (row[:, None] < num_blocks) & (column < SIZE)
    at = row[:, None] * SIZE + column
    values = tl.load(blocks + at, mask=there, other=0.0)
    largest = tl.max(tl.abs(values), axis=1)
    values = values / tl.where(largest > 0, largest, 1.0)[:, None]  # so that no square over- or underflows
    importance = there.to(tl.float32)
    if WEIGHTED:
        given = tl.load(weights + at, mask=there, other=0.0)
        importance = tl.where(tl.max(given, axis=1)[:, None] > 0, given, importance)
    best_gain = tl.full([ROWS], float("-inf"), tl.float32)
    best_scale = tl.full([ROWS], 1.0, tl.float32)
    half: tl.constexpr = (BINS - 1) / 2
    for trial in range(TRIALS):
        scale = tl.zeros([ROWS], tl.float32) + tl.load(multiples + trial)
        for _ in tl.static_range(2):  # the trial, then its polished scale
            inverse = tl.where(scale > SMALLEST, half / scale, 0.0)
            index = tl.minimum(tl.maximum(values * inverse[:, None] + (half + 0.5), 0.0), BINS - 1.0).to(tl.int32)
            level = tl.load(table + index)
            dot = tl.sum(importance * values * level, axis=1)
            norm = tl.sum(importance * level * level, axis=1)
            gain = scale * (2 * dot - scale * norm)  # sum f w^2 - error
            better = gain > best_gain
            best_gain = tl.where(better, gain, best_gain)
            best_scale = tl.where(better, scale, best_scale)
            scale = tl.maximum(tl.where(norm > 0, dot / tl.maximum(norm, LEAST_NORM), scale), 0.0)
    tl.store(scales + row, best_scale * largest, mask=row < num_blocks)


def search_scales(
    blocks: Float32[Tensor, "blocks block_size"],
    weights: Float32[Tensor, "blocks block_size"] | None,
    table: Float32[Tensor, " bins"],
    multiples: Float32[Tensor, " trials"],
    smallest_scale: float,
) -> Float32[Tensor, " blocks"]:
    """The scale of each block, found as there but for the order of sums.

    Args:
        weights: a block of zeros counts as one of ones.
        table: the level of a scaled weight, from -1 to 1.
        multiples: of the largest magnitude, to try.
    """
    num_blocks, size = blocks.shape
    scales = blocks.new_empty(num_blocks)
    if num_blocks == 0:
        return scales
    blocks = blocks.contiguous()
    padded = triton.next_power_of_2(size)
    config = config_of("scale_search", blocks.device)
    rows = max(1, config.columns // padded)
    with torch.cuda.device_of(blocks):
        scale_search_kernel[(triton.cdiv(num_blocks, rows),)](
            scales,
            blocks,
            blocks if weights is None else weights.contiguous(),
            table,
            multiples,
            num_blocks,
            SIZE=size,
            PADDED=padded,
            BINS=len(table),
            SMALLEST=smallest_scale,
            TRIALS=len(multiples),
            WEIGHTED=weights is not None,
            ROWS=rows,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return scales
