"""y = x Q^T + (x L2^T) L1^T for up to 16 rows of x, dequantizing on the way, on tensor cores with float32 sums.

As matvec.py, with one `tl.dot` over the 16 lanes of each field in place of its multiply-adds. Levels are rounded to
the dtype of x, scales are not: they multiply the sum over a block.
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
from quantizers.kernels.layout import PLANE_BITS, num_superblocks

if TYPE_CHECKING:
    from quantizers.kernels.block_weight import BlockWeight

_DOT_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
@no_type_check
def matmul_kernel(
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
    M,
    N,
    K,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
    SUPER_BLOCK: tl.constexpr,
    INTEGER: tl.constexpr,
    RANK: tl.constexpr,
    FACTOR_BITS: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """x is [M, K], inner [M, RANK], out [SPLITS, M, N], all contiguous; DOT is the dtype that is multiplied."""
    num_supers = tl.cdiv(K, 256)
    num_blocks = tl.cdiv(K, BLOCK)
    split = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = rows.to(tl.int64)
    m, lane = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    book = tl.load(levels + tl.arange(0, 2 ** (LOW + HIGH)))
    there = (n < N)[:, None]
    total = tl.zeros([16, ROWS], dtype=tl.float32)
    for sup in range(split, num_supers, SPLITS):
        planes = load_planes(low_plane, high_plane, (n * num_supers + sup)[:, None], lane, there, LOW, HIGH)
        for block_of_super in tl.static_range(256 // BLOCK):
            block = tl.full([ROWS], block_of_super, tl.int32) + sup * (256 // BLOCK)
            has_scale = (n < N) & (block < num_blocks)
            scale = load_scales(scale_codes, steps, offset, n * num_blocks + block, has_scale, SUPER_BLOCK)
            zero = load_zeros(zeros, (n * num_blocks + block)[:, None], has_scale[:, None], INTEGER)
            part = tl.zeros([16, ROWS], dtype=tl.float32)
            for field in tl.static_range(block_of_super * (BLOCK // 16), (block_of_super + 1) * (BLOCK // 16)):
                k = sup * 256 + field * 16 + lane
                some = tl.load(x + m * K + k, mask=(m < M) & (k < K), other=0.0).to(DOT)
                value = values_of(planes, book, zero, field, LOW, HIGH, INTEGER).to(DOT)
                part = tl.dot(some, tl.trans(value), part, input_precision="ieee")
            total += part * scale[None, :]
    if RANK > 0:
        for start in range(0, RANK, 16):  # the first split adds it, the others nothing
            r = start + lane
            some = tl.load(inner + m * RANK + r, mask=(m < M) & (r < RANK * (1 - split)), other=0.0).to(DOT)
            factors = load_factor(factor, factor_scale, n[:, None], r, N, there & (r < RANK), RANK, FACTOR_BITS)
            total = tl.dot(some, tl.trans(factors.to(DOT)), total, input_precision="ieee")
    at = out + (split * M + m).to(tl.int64) * N + rows[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < M) & (rows < N)[None, :])


def matmul(
    x: Float[Tensor, "rows in"], weight: "BlockWeight", factors: KernelFactors | None
) -> Float[Tensor, "rows out"]:
    """The product of at most 16 rows, in the dtype of `x`."""
    num_rows = x.shape[0]
    rows, columns = weight.shape
    if num_rows == 0:
        return x.new_empty(0, rows)
    config = config_of("matmul", x.device)
    row_tiles = triton.cdiv(rows, config.rows)
    splits = num_splits(row_tiles, num_superblocks(columns), x.device)
    x = x.contiguous()
    out = torch.empty(splits, num_rows, rows, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    inner, factor, factor_scale = (x, x, x) if factors is None else (factors.inner(x), *factors.pointers())
    low, high = (*PLANE_BITS[weight.form.bits], 0)[:2]
    with torch.cuda.device_of(x):
        matmul_kernel[(row_tiles, splits)](
            x,
            out,
            *weight.pointers(),
            inner,
            factor,
            factor_scale,
            num_rows,
            rows,
            columns,
            LOW=low,
            HIGH=high,
            BLOCK=weight.form.block_size,
            SUPER_BLOCK=weight.form.super_block,
            INTEGER=weight.zeros is not None,
            RANK=0 if factors is None else factors.low_rank.rank,
            FACTOR_BITS=16 if factors is None else factors.low_rank.bits,
            DOT=dot_dtype(x.dtype),
            ROWS=config.rows,
            SPLITS=splits,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's interpreter keeps bfloat16 as integers, and multiplies those; it gets float32."""
    interpreted = not isinstance(matmul_kernel, triton.JITFunction)
    return tl.float32 if interpreted and dtype == torch.bfloat16 else _DOT_DTYPES[dtype]
