"""Loops over packed codes, compiled by numba for the CPU. compiled.py calls them, where numba is there.

They read what packing.py and the formats describe and check nothing: an index out of range would read whatever lies
there.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

WORD_BITS = 32
HALF = WORD_BITS // 2  # the smallest block
TILE = 16
# Codes that are looked up together: their levels stand side by side in a table that fits into a cache.
FIELD_CODES = {2: 4, 3: 4, 4: 2, 5: 2, 6: 2, 8: 1}


IN_ANY_ORDER = {"reassoc", "contract", "nsz"}  # sums become vectors, and a NaN stays one


def compile_loop(loop: Callable[..., None], name: str, *, freedom: set[str] | None = None) -> Any:
    """Without the lock of Python, and kept on disk for the next process where there is a folder for that.

    Args:
        name: of the file there, with the line: no two loops may share one, or processes that compile both at once
            would mix them up.
    """
    loop = inspect.unwrap(loop)  # tests check the types of arguments
    loop.__qualname__ = name
    settings: dict[str, Any] = {"nogil": True, "fastmath": freedom or False}
    try:
        return numba.njit(cache=True, **settings)(loop)
    except RuntimeError:
        return numba.njit(**settings)(loop)


def _product_blocks(bits: int) -> Any:
    """With `bits` a constant, the inner loops are unrolled: each field has its own shift."""
    field_codes = FIELD_CODES[bits]
    field_bits = bits * field_codes
    num_fields = WORD_BITS // field_codes
    code_mask, field_mask = np.uint32((1 << bits) - 1), np.uint32((1 << field_bits) - 1)

    def product_blocks(
        words: np.ndarray,
        levels: np.ndarray,
        scale_words: np.ndarray,
        scale_bits: int,
        scale_steps: np.ndarray,
        super_block: int,
        scale_offset: np.float32,
        block_size: int,
        x: np.ndarray,
        y: np.ndarray,
        first: int,
        stop: int,
    ) -> None:
        table = np.empty((1 << field_bits, field_codes), np.float32)
        for field in range(1 << field_bits):
            for j in range(field_codes):
                table[field, j] = levels[(field >> (j * bits)) & code_mask]
        scale_mask = np.uint32((1 << scale_bits) - 1)
        num_groups, halves = x.shape[1] // WORD_BITS, block_size // HALF
        num_blocks = (2 * num_groups + halves - 1) // halves
        values = np.empty(WORD_BITS, np.float32)
        number = first * num_blocks  # of the scale, and how many more have its step
        step, same_step = number // super_block, super_block - number % super_block
        for row in range(first, stop):
            for t in range(x.shape[0]):
                y[t, row] = 0
            scale, same_scale = np.float32(0), 0
            for group in range(num_groups):
                start = (row * num_groups + group) * bits
                for k in range(num_fields):
                    word, shift = start + (k * field_bits) // WORD_BITS, (k * field_bits) % WORD_BITS
                    field = words[word] >> np.uint32(shift)
                    if shift + field_bits > WORD_BITS:
                        field |= words[word + 1] << np.uint32(WORD_BITS - shift)
                    field &= field_mask
                    for j in range(field_codes):
                        values[k * field_codes + j] = table[field, j]
                for half in range(2):
                    if same_scale == 0:
                        word, shift = number * scale_bits // WORD_BITS, number * scale_bits % WORD_BITS
                        code = scale_words[word] >> np.uint32(shift)
                        if shift + scale_bits > WORD_BITS:
                            code |= scale_words[word + 1] << np.uint32(WORD_BITS - shift)
                        scale = scale_offset + np.float32(code & scale_mask) * scale_steps[step]
                        number, same_step, same_scale = number + 1, same_step - 1, halves
                        if same_step == 0:
                            step, same_step = step + 1, super_block
                    same_scale -= 1
                    for t in range(x.shape[0]):
                        total = np.float32(0)
                        for k in range(HALF):
                            total += values[half * HALF + k] * x[t, group * WORD_BITS + half * HALF + k]
                        y[t, row] += total * scale

    return compile_loop(product_blocks, f"product_blocks_{bits}", freedom=IN_ANY_ORDER)


# By bits: rows `first` to `stop` of the weight times each row of x [n, columns] into y [n, rows]. Columns are a
# multiple of 32 and blocks one of 16; scales as in double_quant.py.
PRODUCT_BLOCKS = {bits: _product_blocks(bits) for bits in FIELD_CODES}


def _tile(
    words: np.ndarray, start: int, bits: int, state_bits: int, levels: np.ndarray, level_start: int, values: np.ndarray
) -> None:
    """The levels of one tile into `values` [TILE * TILE]."""
    width, symbol_mask, mask = np.uint32(bits), np.uint64((1 << bits) - 1), np.uint32((1 << state_bits) - 1)
    state = np.uint32(0)  # before the first symbol it is that after the last
    for back in range(-(-state_bits // bits), 0, -1):
        position = (TILE * TILE - back) * bits
        word, shift = start + position // WORD_BITS, position % WORD_BITS
        symbol = np.uint64(words[word]) >> np.uint64(shift)
        if shift + bits > WORD_BITS:
            symbol |= np.uint64(words[word + 1]) << np.uint64(WORD_BITS - shift)
        state = ((state << width) | np.uint32(symbol & symbol_mask)) & mask
    word, buffer, have = start, np.uint64(0), 0
    for k in range(TILE * TILE):
        if have < bits:
            buffer |= np.uint64(words[word]) << np.uint64(have)
            word += 1
            have += WORD_BITS
        state = ((state << width) | np.uint32(buffer & symbol_mask)) & mask
        buffer >>= np.uint64(width)
        have -= bits
        values[k] = levels[level_start + state]


_tile = compile_loop(_tile, "tile")


def _decode_tiles(
    words: np.ndarray,
    starts: np.ndarray,
    tile_bits: np.ndarray,
    state_bits: np.ndarray,
    levels: np.ndarray,
    level_starts: np.ndarray,
    scale: np.float32,
    out: np.ndarray,
    first: int,
    stop: int,
) -> None:
    num_columns = out.shape[1] // TILE
    values = np.empty(TILE * TILE, np.float32)
    for row in range(first, stop):
        for column in range(num_columns):
            tile = row * num_columns + column
            bits = tile_bits[tile]
            _tile(words, starts[tile], bits, state_bits[bits], levels, level_starts[bits], values)
            for i in range(TILE):
                for j in range(TILE):
                    out[row * TILE + i, column * TILE + j] = values[i * TILE + j] * scale


def _product_tiles(
    words: np.ndarray,
    starts: np.ndarray,
    tile_bits: np.ndarray,
    state_bits: np.ndarray,
    levels: np.ndarray,
    level_starts: np.ndarray,
    scale: np.float32,
    x: np.ndarray,
    y: np.ndarray,
    first: int,
    stop: int,
) -> None:
    num_columns = x.shape[1] // TILE
    values, totals = np.empty(TILE * TILE, np.float32), np.empty((x.shape[0], TILE), np.float32)
    for row in range(first, stop):
        totals[:] = 0
        for column in range(num_columns):
            tile = row * num_columns + column
            bits = tile_bits[tile]
            _tile(words, starts[tile], bits, state_bits[bits], levels, level_starts[bits], values)
            for t in range(x.shape[0]):
                for i in range(TILE):
                    total = np.float32(0)
                    for j in range(TILE):
                        total += values[i * TILE + j] * x[t, column * TILE + j]
                    totals[t, i] += total
        for t in range(x.shape[0]):
            for i in range(TILE):
                y[t, row * TILE + i] = totals[t, i] * scale


# levels[states] * scale of rows `first` to `stop` of tiles into `out`, or times each row of x [n, columns] into y
# [n, rows]; all sides are multiples of a tile's. `starts` are first words and `tile_bits` bits of a symbol, tile by
# tile; `state_bits` and `level_starts` are by bits of a symbol.
decode_tiles = compile_loop(_decode_tiles, "decode_tiles")
product_tiles = compile_loop(_product_tiles, "product_tiles", freedom=IN_ANY_ORDER)
