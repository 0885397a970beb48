"""Q dense from the kernel layout: Q[n, k] = level[code] * scale, or (code - zero) * scale, in any float dtype."""

from typing import TYPE_CHECKING, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from quantizers.kernels.configs import config_of
from quantizers.kernels.decode import load_planes, load_scales, load_zeros, values_of
from quantizers.kernels.layout import PLANE_BITS, SUPERBLOCK, num_superblocks

if TYPE_CHECKING:
    from quantizers.kernels.block_weight import BlockWeight


@triton.jit
@no_type_check
def dequantize_kernel(
    out,
    low_plane,
    high_plane,
    levels,
    scale_codes,
    steps,
    offset,
    zeros,
    N,
    K,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
    SUPER_BLOCK: tl.constexpr,
    INTEGER: tl.constexpr,
    ROWS: tl.constexpr,
    SUPERS: tl.constexpr,
):
    """One tile of ROWS rows and SUPERS superblocks a program; out is [N, K], contiguous."""
    num_supers = tl.cdiv(K, 256)
    num_blocks = tl.cdiv(K, BLOCK)
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    sup = (tl.program_id(1) * SUPERS + tl.arange(0, SUPERS))[None, :, None]
    lane = tl.arange(0, 16)[None, None, :]
    book = tl.load(levels + tl.arange(0, 2 ** (LOW + HIGH)))
    there = (n < N) & (sup < num_supers)
    planes = load_planes(low_plane, high_plane, n * num_supers + sup, lane, there, LOW, HIGH)
    for field in tl.static_range(16):
        block = sup * (256 // BLOCK) + field * 16 // BLOCK
        has_scale = there & (block < num_blocks)
        scale = load_scales(scale_codes, steps, offset, n * num_blocks + block, has_scale, SUPER_BLOCK)
        zero = load_zeros(zeros, n * num_blocks + block, has_scale, INTEGER)
        value = scale * values_of(planes, book, zero, field, LOW, HIGH, INTEGER)
        k = sup * 256 + field * 16 + lane
        tl.store(out + n * K + k, value.to(out.dtype.element_ty), mask=(n < N) & (k < K))


def dequantize(weight: "BlockWeight", dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """Q in `dtype`: float32, float16 or bfloat16, computed in float32."""
    rows, columns = weight.shape
    out = torch.empty(rows, columns, dtype=dtype, device=weight.levels.device)
    if out.numel() == 0:
        return out
    config = config_of("dequantize", out.device)
    low, high = (*PLANE_BITS[weight.form.bits], 0)[:2]
    supers = config.columns // SUPERBLOCK
    grid = (triton.cdiv(rows, config.rows), triton.cdiv(num_superblocks(columns), supers))
    with torch.cuda.device_of(out):
        dequantize_kernel[grid](
            out,
            *weight.pointers(),
            rows,
            columns,
            LOW=low,
            HIGH=high,
            BLOCK=weight.form.block_size,
            SUPER_BLOCK=weight.form.super_block,
            INTEGER=weight.zeros is not None,
            ROWS=config.rows,
            SUPERS=supers,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out
