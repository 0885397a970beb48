"""The rotated weight of a trellis dense: W'[n, k] = scale * level[state], see trellis_format.py.

The symbols of a tile are read from a stream that runs backwards (trellis_weight.py draws it), so that a state is
`STATE_BITS` neighbouring bits, which at most two words hold, and the codebook is looked up in the cache.
"""

from typing import TYPE_CHECKING, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from quantizers.kernels.trellis_weight import TrellisWeight

_TILES = 8  # of 256 weights, a program
_NUM_WARPS = 4


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
    first_bit = (255 - step) * BITS
    word = first_bit // 32
    shift = first_bit % 32
    stream = words + tile * (8 * BITS)
    first = tl.load(stream + word, mask=there, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    second = tl.load(stream + (word + 1) % (8 * BITS), mask=there, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    state = ((first | (second << 32)) >> shift.to(tl.uint64)).to(tl.int32) & (2**STATE_BITS - 1)
    value = tl.load(levels + state) * tl.load(scale)
    tiles_a_row = tl.cdiv(K, 16)
    n = tile // tiles_a_row * 16 + step // 16
    k = tile % tiles_a_row * 16 + step % 16
    tl.store(out + n * K + k, value.to(out.dtype.element_ty), mask=there & (n < N) & (k < K))


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
