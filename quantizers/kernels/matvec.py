"""y = x Q^T + (x L2^T) L1^T for one row x, dequantizing on the way, in float32 multiply-adds.

A program holds a tile of rows of Q and walks along its columns, some superblocks at a time. The 16 fields of a tile
are unrolled; a scale is applied to the sum over the fields of its block. Where rows alone do not fill the card,
several programs share the columns (SPLITS), and torch adds their sums: the result does not depend on their order.
"""

from typing import TYPE_CHECKING, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from quantizers.kernels.abstract_weight import KernelFactors
from quantizers.kernels.configs import config_of, num_splits
from quantizers.kernels.decode import load_factor, load_planes, load_scales, load_zeros, values_of
from quantizers.kernels.layout import PLANE_BITS, SUPERBLOCK, num_superblocks

if TYPE_CHECKING:
    from quantizers.kernels.block_weight import BlockWeight


@triton.jit
@no_type_check
def matvec_kernel(
    x,
    out,
    low_plane,
    high_plane,
    levels,
    scale_codes,
    steps,
    offset,
    zeros,
    inner,
    factor,
    factor_scale,
    N,
    K,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
    SUPER_BLOCK: tl.constexpr,
    INTEGER: tl.constexpr,
    RANK: tl.constexpr,
    FACTOR_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    SUPERS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """x is [K], inner [RANK], out [SPLITS, N], all contiguous; RANK 0 is no low-rank part."""
    num_supers = tl.cdiv(K, 256)
    num_blocks = tl.cdiv(K, BLOCK)
    split = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = rows.to(tl.int64)[:, None, None]
    lane = tl.arange(0, 16)[None, None, :]
    book = tl.load(levels + tl.arange(0, 2 ** (LOW + HIGH)))
    total = tl.zeros([ROWS, SUPERS, 16], dtype=tl.float32)
    for first in range(split * SUPERS, num_supers, SUPERS * SPLITS):
        sup = (first + tl.arange(0, SUPERS))[None, :, None]
        there = (n < N) & (sup < num_supers)
        planes = load_planes(low_plane, high_plane, n * num_supers + sup, lane, there, LOW, HIGH)
        for block_of_super in tl.static_range(256 // BLOCK):
            block = sup * (256 // BLOCK) + block_of_super
            has_scale = there & (block < num_blocks)
            scale = load_scales(scale_codes, steps, offset, n * num_blocks + block, has_scale, SUPER_BLOCK)
            zero = load_zeros(zeros, n * num_blocks + block, has_scale, INTEGER)
            part = tl.zeros([ROWS, SUPERS, 16], dtype=tl.float32)
            for field in tl.static_range(block_of_super * (BLOCK // 16), (block_of_super + 1) * (BLOCK // 16)):
                k = sup * 256 + field * 16 + lane
                some = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
                part += some * values_of(planes, book, zero, field, LOW, HIGH, INTEGER)
            total += part * scale
    y = tl.sum(tl.sum(total, 2), 1)
    if RANK > 0:
        n = rows.to(tl.int64)[:, None]
        for start in range(0, RANK, 16):  # the first split adds it, the others nothing
            r = start + tl.arange(0, 16)[None, :]
            some = tl.load(inner + r, mask=(r < RANK * (1 - split)), other=0.0).to(tl.float32)
            factors = load_factor(factor, factor_scale, n, r, N, (n < N) & (r < RANK), RANK, FACTOR_BITS)
            y += tl.sum(factors * some, 1)
    tl.store(out + split * N + rows, y.to(out.dtype.element_ty), mask=rows < N)


def matvec(x: Float[Tensor, "1 in"], weight: "BlockWeight", factors: KernelFactors | None) -> Float[Tensor, "1 out"]:
    """The product, in the dtype of `x`; sums are float32."""
    rows, columns = weight.shape
    config = config_of("matvec", x.device)
    row_tiles = triton.cdiv(rows, config.rows)
    supers = config.columns // SUPERBLOCK
    splits = num_splits(row_tiles, triton.cdiv(num_superblocks(columns), supers), x.device)
    x = x.contiguous()
    out = torch.empty(splits, rows, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    inner, factor, factor_scale = (x, x, x) if factors is None else (factors.inner(x), *factors.pointers())
    low, high = (*PLANE_BITS[weight.form.bits], 0)[:2]
    with torch.cuda.device_of(x):
        matvec_kernel[(row_tiles, splits)](
            x,
            out,
            *weight.pointers(),
            inner,
            factor,
            factor_scale,
            rows,
            columns,
            LOW=low,
            HIGH=high,
            BLOCK=weight.form.block_size,
            SUPER_BLOCK=weight.form.super_block,
            INTEGER=weight.zeros is not None,
            RANK=0 if factors is None else factors.low_rank.rank,
            FACTOR_BITS=16 if factors is None else factors.low_rank.bits,
            ROWS=config.rows,
            SUPERS=supers,
            SPLITS=splits,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out if splits == 1 else out.sum(0, keepdim=True).to(x.dtype)
