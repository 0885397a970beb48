"""Columns in turn, each one's error passed on to those after it: block_rounding.py, with some rows a program."""

from typing import TYPE_CHECKING, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, UInt8
from torch import Tensor

from quantizers.kernels.configs import config_of

if TYPE_CHECKING:
    from quantizers.block_grid import BlockGrid


@triton.jit
@no_type_check
def column_feedback_kernel(
    codes,
    values,
    target,
    right,
    scales,
    zeros,
    levels,
    bounds,
    N,
    num_tiles,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    INTEGER: tl.constexpr,
    ROWS: tl.constexpr,
):
    """codes, values and target are [N, num_tiles, WIDTH]; right is [num_tiles, WIDTH, WIDTH], unit upper triangular.

    scales and zeros are [N, num_tiles]; bounds [NUM_LEVELS] lie between the levels, the last is infinite.
    """
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    tile = tl.program_id(1)
    column = tl.arange(0, PADDED)
    block = n * num_tiles + tile
    there = n < N
    inside = there[:, None] & (column[None, :] < WIDTH)
    given = tl.load(target + block[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
    scale = tl.load(scales + block, mask=there, other=0.0)
    divisor = tl.maximum(scale, 1.1754943508222875e-38)
    if INTEGER:
        zero = tl.load(zeros + block, mask=there, other=0.0)
    else:
        bound = tl.load(bounds + tl.arange(0, NUM_LEVELS))
    work = given
    for each in range(WIDTH):
        is_here = column[None, :] == each
        weight = tl.sum(tl.where(is_here, work, 0.0), axis=1) / divisor
        if INTEGER:
            step = tl.floor(weight + 0.5)
            is_odd_tie = (step - weight == 0.5) & (step - 2 * tl.floor(step / 2) == 1)
            step = tl.where(is_odd_tie, step - 1, step)  # half to even, like torch
            step = tl.minimum(tl.maximum(step, -zero), NUM_LEVELS - 1 - zero)
            code = (step + zero).to(tl.int32)
            value = step * scale
        else:
            code = tl.sum((bound[None, :] < weight[:, None]).to(tl.int32), axis=1)
            value = tl.load(levels + code) * scale
        error = tl.sum(tl.where(is_here, given, 0.0), axis=1) - value
        passed = tl.load(right + (tile * WIDTH + each) * WIDTH + column, mask=column < WIDTH, other=0.0)
        work += tl.where(column[None, :] > each, error[:, None] * passed[None, :], 0.0)
        tl.store(codes + block * WIDTH + each, code.to(tl.uint8), mask=there)
        tl.store(values + block * WIDTH + each, value, mask=there)


def columns_in_turn(
    target: Float32[Tensor, "out tiles width"], grid: "BlockGrid", right: Float32[Tensor, "tiles width width"]
) -> tuple[UInt8[Tensor, "out tiles width"], Float32[Tensor, "out tiles width"]]:
    """Codes and values, as there but for the last bits of errors, which may turn a code."""
    target, levels = target.contiguous(), grid.levels.contiguous()
    rows, num_tiles, width = target.shape
    codes, values = torch.empty_like(target, dtype=torch.uint8), torch.empty_like(target)
    scales, config = grid.scales.contiguous(), config_of("column_feedback", target.device)
    bounds = torch.nn.functional.pad((levels[1:] + levels[:-1]) / 2, (0, 1), value=torch.inf)
    with torch.cuda.device_of(target):
        column_feedback_kernel[(triton.cdiv(rows, config.rows), num_tiles)](
            codes,
            values,
            target,
            right.contiguous(),
            scales,
            scales if grid.zeros is None else grid.zeros.contiguous(),
            levels,
            bounds,
            rows,
            num_tiles,
            WIDTH=width,
            PADDED=triton.next_power_of_2(width),
            NUM_LEVELS=len(levels),
            INTEGER=grid.zeros is not None,
            ROWS=config.rows,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return codes, values
