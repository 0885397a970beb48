"""A trellis's rotated weight, W'[n, k] = scale * level[state] (trellis_format.py): dense, or multiplied on the way.

The symbols of a tile are read from a stream that runs backwards (trellis_weight.py draws it), so that a state is
`STATE_BITS` neighbouring bits. The 16 weights of a tile's row lie in a few words, which are loaded once; their states
are cut out by constants. Neighbouring weights have any two of 4096 states, for each of which the cache would bring a
line, so levels are looked up by `tl.gather`, which goes through shared memory: all of a program at one go, as it puts
the codebook there each time.

A product of 1 to 16 rows is on tensor cores, with levels in the dtype of x and float32 sums; a single row is padded.
Where rows of W' alone do not fill the card, several programs share the columns (SPLITS), and torch adds their sums.
What lies beyond N or K is read from the last tile, and not stored, or multiplied by 0.
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


@triton.jit
@no_type_check
def load_word(words, tile, first, half, INDEX: tl.constexpr, BITS: tl.constexpr):
    """32 bits from bit 32 * (first + INDEX) + half of the tiles' streams, around their end; half is 0 or 16."""
    at = tile * (8 * BITS)
    word = tl.load(words + (at + (first + INDEX) % (8 * BITS))).to(tl.uint32, bitcast=True)
    if BITS % 2 == 1:  # a row has an odd number of half words
        after = tl.load(words + (at + (first + INDEX + 1) % (8 * BITS))).to(tl.uint32, bitcast=True)
        word = (word >> half) | ((after << 1) << (31 - half))  # a shift by 32 would mean nothing
    return word


@triton.jit
@no_type_check
def state_of(row, COLUMN: tl.constexpr, BITS: tl.constexpr, STATE_BITS: tl.constexpr):
    """Of the weights in column COLUMN, from what `levels_of_rows` loads."""
    WORD: tl.constexpr = (15 - COLUMN) * BITS // 32
    SHIFT: tl.constexpr = (15 - COLUMN) * BITS % 32
    window = row[WORD] >> SHIFT
    if SHIFT + STATE_BITS > 32:
        window |= row[WORD + 1] << (32 - SHIFT)
    return (window & (2**STATE_BITS - 1)).to(tl.int32)


@triton.jit
@no_type_check
def two_states(row, COLUMN: tl.constexpr, BITS: tl.constexpr, STATE_BITS: tl.constexpr):
    """[..., 2]: every eighth column."""
    return tl.join(state_of(row, COLUMN, BITS, STATE_BITS), state_of(row, COLUMN + 8, BITS, STATE_BITS))


@triton.jit
@no_type_check
def four_states(row, COLUMN: tl.constexpr, BITS: tl.constexpr, STATE_BITS: tl.constexpr):
    """[..., 2, 2]: every fourth column."""
    return tl.join(two_states(row, COLUMN, BITS, STATE_BITS), two_states(row, COLUMN + 4, BITS, STATE_BITS))


@triton.jit
@no_type_check
def eight_states(row, COLUMN: tl.constexpr, BITS: tl.constexpr, STATE_BITS: tl.constexpr):
    """[..., 2, 2, 2]: every second column."""
    return tl.join(four_states(row, COLUMN, BITS, STATE_BITS), four_states(row, COLUMN + 2, BITS, STATE_BITS))


@triton.jit
@no_type_check
def levels_of_rows(words, book, tile, row, BITS: tl.constexpr, STATE_BITS: tl.constexpr):
    """[tile, row, 16] of the rows numbered `row` within the tiles numbered `tile`; all words have numbers below 2**31.

    Args:
        book: the levels, in registers.
        tile, row: int32 that together are [tile, row].
    """
    bit = (15 - row) * (16 * BITS)
    first, half = bit // 32, (bit % 32).to(tl.uint32)
    last: tl.constexpr = (15 * BITS + STATE_BITS - 1) // 32
    w0 = load_word(words, tile, first, half, 0, BITS)
    w1 = load_word(words, tile, first, half, 1 if last > 0 else 0, BITS)
    w2 = load_word(words, tile, first, half, 2 if last > 1 else 0, BITS)
    loaded = (w0, w1, w2)
    states = tl.join(eight_states(loaded, 0, BITS, STATE_BITS), eight_states(loaded, 1, BITS, STATE_BITS))
    values = tl.gather(book, tl.reshape(states, [states.numel]), 0)
    return tl.reshape(values, [w0.shape[0], w0.shape[1], 16])


@triton.jit
@no_type_check
def trellis_kernel(
    out,
    words,
    levels,
    scale,
    N,
    K,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """out is [N, K], contiguous; words are tiles of 8 * BITS, row of tiles by row of tiles."""
    tiles_a_row = tl.cdiv(K, 16)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)[:, None]
    at = tl.minimum(n, N - 1) // 16 * tiles_a_row + tl.minimum(tile, tiles_a_row - 1)
    book = tl.load(levels + tl.arange(0, 2**STATE_BITS))
    value = levels_of_rows(words, book, at, n % 16, BITS, STATE_BITS) * tl.load(scale)
    k = (tile * 16)[:, :, None] + tl.arange(0, 16)[None, None, :]
    there = (n < N)[:, :, None] & (k < K)
    tl.store(out + n.to(tl.int64)[:, :, None] * K + k, value.to(out.dtype.element_ty), mask=there)


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
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """x is [M, K], M at most 16, out [SPLITS, M, N], contiguous; DOT is the dtype that is multiplied."""
    tiles_a_row = tl.cdiv(K, 16)
    split = tl.program_id(1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_of_tiles = (tl.minimum(n, N - 1) // 16)[None, :] * tiles_a_row
    row = (n % 16)[None, :]
    m = tl.arange(0, 16)[:, None]
    book = tl.load(levels + tl.arange(0, 2**STATE_BITS)).to(DOT)
    total = tl.zeros([16, ROWS], dtype=tl.float32)
    for first in range(split * TILES, tiles_a_row, TILES * SPLITS):
        tile = first + tl.arange(0, TILES)[:, None]
        value = levels_of_rows(words, book, row_of_tiles + tl.minimum(tile, tiles_a_row - 1), row, BITS, STATE_BITS)
        k = first * 16 + tl.arange(0, TILES * 16)[None, :]
        some = tl.load(x + m * K + k, mask=(m < M) & (k < K), other=0.0).to(DOT)
        value = tl.reshape(tl.permute(value, [0, 2, 1]), [TILES * 16, ROWS])
        total = tl.dot(some, value, total, input_precision="ieee")
    y = total * tl.load(scale)
    at = out + (split * M + m).to(tl.int64) * N + n[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=(m < M) & (n < N)[None, :])


def dequantize_trellis(weight: "TrellisWeight", dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """W' in `dtype`: float32, float16 or bfloat16."""
    rows, columns = weight.shape
    out = torch.empty(rows, columns, dtype=dtype, device=weight.words.device)
    config = config_of("trellis", out.device)
    with torch.cuda.device_of(out):
        trellis_kernel[(triton.cdiv(rows, config.rows), triton.cdiv(columns, config.columns))](
            out,
            weight.words,
            weight.levels,
            weight.scale,
            rows,
            columns,
            BITS=weight.form.bits,
            STATE_BITS=weight.form.state_bits,
            ROWS=config.rows,
            TILES=config.columns // 16,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


def trellis_product(x: Float[Tensor, "rows in"], weight: "TrellisWeight") -> Float[Tensor, "rows out"]:
    """x W'^T of 1 to 16 rows in the dtype of `x`: float16 or bfloat16, as tensor cores have them."""
    num_rows = x.shape[0]
    rows, columns = weight.shape
    config = config_of("trellis_product", x.device)
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
            ROWS=config.rows,
            TILES=config.columns // 16,
            SPLITS=splits,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)
