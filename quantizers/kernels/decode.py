"""The parts that the kernels over block formats share: words of a plane, codes of a field, scales of a block.

Shapes: a tile is [out] x [super] x [lane] or [out] x [lane]; whatever is passed in has the tile's shape, or
broadcasts to it. `no_type_check` keeps the tests' type checker from wrapping functions that Triton compiles.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def load_words(plane, cell, lane, mask, WIDTH: tl.constexpr):
    """Both words of a plane of WIDTH bits as int32; planes of 1 and 2 bits have one, given twice.

    `cell` is row * superblocks + superblock.
    """
    if WIDTH == 4:
        at = plane + cell * 32 + lane
        return tl.load(at, mask=mask, other=0), tl.load(at + 16, mask=mask, other=0)
    word = tl.load(plane + cell * 16 + lane, mask=mask, other=0).to(tl.int32)
    return word, word


@triton.jit
@no_type_check
def load_planes(low_plane, high_plane, cell, lane, mask, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The words of both planes; HIGH 0 is no second plane, and the first is given twice."""
    low = load_words(low_plane, cell, lane, mask, LOW)
    if HIGH > 0:
        return low, load_words(high_plane, cell, lane, mask, HIGH)
    return low, low


@triton.jit
@no_type_check
def field_of(first, second, FIELD: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH bits of field FIELD from the words of `load_words`."""
    FIRST_BIT: tl.constexpr = FIELD * WIDTH
    if FIRST_BIT < 32:
        return (first >> FIRST_BIT) & (2**WIDTH - 1)
    return (second >> (FIRST_BIT - 32)) & (2**WIDTH - 1)


@triton.jit
@no_type_check
def values_of(planes, levels, zero, FIELD: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, INTEGER: tl.constexpr):
    """Field FIELD of the words of `load_planes` as float32: a level, or the code less `zero`.

    `levels` is in registers; the look-up is 1-D, since a 2-D `tl.gather` asks for a layout that Triton may refuse.
    """
    codes = field_of(planes[0][0], planes[0][1], FIELD, LOW)
    if HIGH > 0:
        codes = codes | (field_of(planes[1][0], planes[1][1], FIELD, HIGH) << LOW)
    if INTEGER:
        values = codes.to(tl.float32) - zero
    else:
        values = tl.reshape(tl.gather(levels, tl.reshape(codes, [codes.numel]), 0), codes.shape)
    return values


@triton.jit
@no_type_check
def load_zeros(zeros, block, mask, INTEGER: tl.constexpr):
    """Zero-points of the blocks numbered `block`; 0 where the format has none."""
    return tl.load(zeros + block, mask=mask, other=0).to(tl.float32) if INTEGER else 0.0


@triton.jit
@no_type_check
def load_scales(scale_codes, steps, offset, block, mask, SUPER_BLOCK: tl.constexpr):
    """offset + code * step of the blocks numbered `block` (row * blocks + block of the row)."""
    codes = tl.load(scale_codes + block, mask=mask, other=0).to(tl.float32)
    return tl.load(offset) + codes * tl.load(steps + block // SUPER_BLOCK, mask=mask, other=0.0)


@triton.jit
@no_type_check
def bfloat16_bits(bits):
    """float32 of a bfloat16 that was loaded as int16: cards without bfloat16 can do this, too."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def load_factor(factor, factor_scale, n, r, N, mask, RANK: tl.constexpr, FACTOR_BITS: tl.constexpr):
    """L1[n, r] as float32: bfloat16 [out, rank], or codes + 127 [rank, out] with a bfloat16 scale for each 128."""
    if FACTOR_BITS == 16:
        return bfloat16_bits(tl.load(factor + n * RANK + r, mask=mask, other=0))
    codes = tl.load(factor + r * N + n, mask=mask, other=127).to(tl.float32) - 127
    scale = tl.load(factor_scale + r * tl.cdiv(N, 128) + n // 128, mask=mask, other=0)
    return codes * bfloat16_bits(scale)
