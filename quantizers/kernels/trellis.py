"""A trellis's rotated weight, W'[n, k] = scale * level[state] (trellis_format.py): dense, or multiplied on the way.

The symbols of a tile are read from a stream that runs backwards (trellis_weight.py draws it), so that a state is
`STATE_BITS` neighbouring bits, which at most two words hold, and the codebook is looked up in the cache. A product of
one row is multiply-adds in float32; one of up to 16 rows is on tensor cores, its levels rounded to the dtype of x.
Where rows of W' alone do not fill the card, several programs share the columns (SPLITS), and torch adds their sums.
"""

from typing import TYPE_CHECKING, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from quantizers.kernels.configs import config_of, num_splits
from quantizers.kernels.matmul import dot_dtype

if TYPE_CHECKING:
    from quantizers.kernels.trellis_weight import TrellisWeight

_TILES = 8  # of 256 weights, a program of `trellis_kernel`
_NUM_WARPS = 4


@triton.jit
@no_type_check
def levels_at(words, levels, tile, step, mask, BITS: tl.constexpr, STATE_BITS: tl.constexpr):
    """Levels of the weights numbered `step` of the tiles numbered `tile`, int64; whatever where `mask` is false."""
    first_bit = (255 - step) * BITS
    word = first_bit // 32
    shift = first_bit % 32
    stream = words + tile * (8 * BITS)
    first = tl.load(stream + word, mask=mask, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    second = tl.load(stream + (word + 1) % (8 * BITS), mask=mask, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    state = ((first | (second << 32)) >> shift.to(tl.uint64)).to(tl.int32) & (2**STATE_BITS - 1)
    return tl.load(levels + state)


@triton.jit
@no_type_check
def trellis_kernel(
    out,
    words,
    levels,
    scale,
    N,
    K,
    num_tiles,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    TILES: tl.constexpr,
):
    """out is [N, K], contiguous; words [num_tiles, 8 * BITS]. Tiles run row of tiles by row of tiles."""
    tile = (tl.program_id(0) * TILES + tl.arange(0, TILES)).to(tl.int64)[:, None]
    step = tl.arange(0, 256)[None, :]
    there = tile < num_tiles
    value = levels_at(words, levels, tile, step, there, BITS, STATE_BITS) * tl.load(scale)
    tiles_a_row = tl.cdiv(K, 16)
    n = tile // tiles_a_row * 16 + step // 16
    k = tile % tiles_a_row * 16 + step % 16
    tl.store(out + n * K + k, value.to(out.dtype.element_ty), mask=there & (n < N) & (k < K))


@triton.jit
@no_type_check
def trellis_product_kernel(
    x,
    out,
    words,
    levels,
    scale,
    M,
    N,
    K,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    DOT: tl.constexpr,
    ONE_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """x is [M, K], out [SPLITS, M, N], contiguous; M is 1 or at most 16. DOT is the dtype that is multiplied."""
    tiles_a_row = tl.cdiv(K, 16)
    split = tl.program_id(1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_of_tiles = (n // 16).to(tl.int64)[:, None] * tiles_a_row
    some = tl.arange(0, COLUMNS)
    step = (n % 16)[:, None] * 16 + (some % 16)[None, :]
    m = tl.arange(0, 16)[:, None]
    total = tl.zeros([ROWS if ONE_ROW else 16, COLUMNS if ONE_ROW else ROWS], dtype=tl.float32)
    for first in range(split * COLUMNS, K, COLUMNS * SPLITS):
        k = first + some
        there = (n < N)[:, None] & (k < K)[None, :]
        value = levels_at(words, levels, row_of_tiles + (k // 16)[None, :], step, there, BITS, STATE_BITS)
        if ONE_ROW:
            total += tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :] * value
        else:
            several = tl.load(x + m * K + k[None, :], mask=(m < M) & (k < K)[None, :], other=0.0).to(DOT)
            total = tl.dot(several, tl.trans(value.to(DOT)), total, input_precision="ieee")
    if ONE_ROW:
        y = tl.sum(total, 1) * tl.load(scale)
        tl.store(out + split * N + n, y.to(out.dtype.element_ty), mask=n < N)
    else:
        y = total * tl.load(scale)
        at = out + (split * M + m).to(tl.int64) * N + n[None, :]
        tl.store(at, y.to(out.dtype.element_ty), mask=(m < M) & (n < N)[None, :])


def dequantize_trellis(weight: "TrellisWeight", dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """W' in `dtype`: float32, float16 or bfloat16."""
    rows, columns = weight.shape
    out = torch.empty(rows, columns, dtype=dtype, device=weight.words.device)
    num_tiles = weight.words.shape[0]
    with torch.cuda.device_of(out):
        trellis_kernel[(triton.cdiv(num_tiles, _TILES),)](
            out,
            weight.words,
            weight.levels,
            weight.scale,
            rows,
            columns,
            num_tiles,
            BITS=weight.form.bits,
            STATE_BITS=weight.form.state_bits,
            TILES=_TILES,
            num_warps=_NUM_WARPS,
        )
    return out


def trellis_product(x: Float[Tensor, "rows in"], weight: "TrellisWeight") -> Float[Tensor, "rows out"]:
    """x W'^T of 1 to 16 rows in the dtype of `x`: float32, float16 or bfloat16."""
    num_rows = x.shape[0]
    rows, columns = weight.shape
    config = config_of("trellis_matvec" if num_rows == 1 else "trellis_matmul", x.device)
    row_tiles = triton.cdiv(rows, config.rows)
    splits = num_splits(row_tiles, triton.cdiv(columns, config.columns), x.device)
    x = x.contiguous()
    out = torch.empty(splits, num_rows, rows, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        trellis_product_kernel[(row_tiles, splits)](
            x,
            out,
            weight.words,
            weight.levels,
            weight.scale,
            num_rows,
            rows,
            columns,
            BITS=weight.form.bits,
            STATE_BITS=weight.form.state_bits,
            DOT=dot_dtype(x.dtype),
            ONE_ROW=num_rows == 1,
            ROWS=config.rows,
            COLUMNS=config.columns,
            SPLITS=splits,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)
