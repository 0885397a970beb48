"""Some rows of a matrix quantized in blocks, without the others: what a table of embeddings is for.

A row's codes lie one after the other wherever the row begins, so a few rows are gathered bit by bit. Runs of rows that
begin at a multiple of `aligned_rows` begin at a whole word and a whole super-block: they are matrices of their own that
share the memory of the whole one. So a table of any size is made and read with little of it dense at a time.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from quantizers.base import finite_float32
from quantizers.block_codebook import CodebookParameters, block_scales
from quantizers.block_format import BlockFormat
from quantizers.block_rounding import block_sides, codes_under, first_parameters
from quantizers.blocks import num_blocks, spread
from quantizers.packing import WORD_BITS, gather, look_up, num_words, pack
from quantizers.quantized import QuantizedTensor
from quantizers.statistics import LayerStatistics

WEIGHTS_AT_ONCE = 2**22


def aligned_rows(form: BlockFormat) -> int:
    """Rows of which each multiple fills whole words and super-blocks, whatever the width of the matrix."""
    return math.lcm(WORD_BITS, form.super_block)


def runs(shape: tuple[int, int], form: BlockFormat) -> list[range]:
    """All rows of a matrix [rows, columns], in runs of about WEIGHTS_AT_ONCE weights."""
    step = aligned_rows(form)
    step *= max(1, WEIGHTS_AT_ONCE // (step * shape[1]))
    return [range(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def quantize_rows(
    read: Callable[[range], Tensor],
    shape: tuple[int, int],
    form: BlockFormat,
    curvature: Float[Tensor, "columns columns"] | None = None,
) -> QuantizedTensor:
    """What quantizing the whole matrix gives, with a run of its rows in memory.

    Args:
        read: gives a run of rows, [run, columns] of any float dtype; called twice for each.
        curvature: H_I, the same for all rows; None for an unweighted error.
    Raises:
        ValueError: the matrix has a NaN or an infinity.
    """
    levels, all_runs, size = form.levels, runs(shape, form), form.block_size
    metric = None if curvature is None else block_sides(LayerStatistics(input_curvature=curvature), size)
    find = partial(block_scales, levels=levels, rule="search")
    first = torch.cat([first_parameters(finite_float32(read(run)), metric, size, find) for run in all_runs])
    parameters = CodebookParameters(first, form, levels)
    words = []
    for run in all_runs:
        rows = slice(run.start, run.stop)
        weight = finite_float32(read(run))
        codes = codes_under(weight, metric, size, find, first[rows], parameters.rows(rows))
        words.append(pack(codes, form.bits))
    return QuantizedTensor(form, shape, {"weight_packed": torch.cat(words)} | parameters.tensors(), levels)


def decode_rows(quantized: QuantizedTensor, rows: Int64[Tensor, " rows"]) -> Float32[Tensor, "rows in"]:
    """These rows of Q, in any order and as often as they are named.

    Raises:
        IndexError: one is no row (on a CPU; on a GPU the device stops, as in any look-up).
    """
    form, columns = _block_format(quantized), quantized.shape[1]
    rows = torch.arange(quantized.shape[0], device=rows.device).index_select(0, rows)  # looks at each of them
    parts = [_decode(quantized, form, some) for some in rows.split(max(1, WEIGHTS_AT_ONCE // columns))]
    return torch.cat(parts) if parts else quantized.levels.new_empty(0, columns)


def _decode(quantized: QuantizedTensor, form: BlockFormat, rows: Int64[Tensor, " rows"]) -> Float32[Tensor, "rows in"]:
    stored, columns = quantized.plain, quantized.shape[1]
    place = torch.arange(columns, device=rows.device)
    if columns % WORD_BITS == 0:  # each row begins with a word
        words = stored["weight_packed"].view(-1, columns // WORD_BITS * form.bits).index_select(0, rows)
        values = look_up(words.view(-1), form.bits, rows.numel() * columns, quantized.levels).view(-1, columns)
    else:
        values = quantized.levels[gather(stored["weight_packed"], form.bits, rows[:, None] * columns + place).int()]
    blocks = num_blocks(columns, form.block_size)
    scale = rows[:, None] * blocks + place[:blocks]
    scale_codes = gather(stored["weight_scale_packed"], form.scale_bits, scale).float()
    scales = torch.addcmul(
        stored["weight_scale_offset"], scale_codes, stored["weight_scale_step"][scale // form.super_block]
    )
    return values * spread(scales, form.block_size, columns)


def decode_runs(quantized: QuantizedTensor) -> Iterator[tuple[range, Float32[Tensor, "run in"]]]:
    """All of Q, a run of rows after the other."""
    form, stored, columns = _block_format(quantized), quantized.plain, quantized.shape[1]
    scales_a_row = num_blocks(columns, form.block_size)
    for run in runs(quantized.shape, form):
        scales = range(run.start * scales_a_row, run.stop * scales_a_row)
        steps = slice(scales.start // form.super_block, -(-scales.stop // form.super_block))
        part = {
            "weight_packed": _words(stored["weight_packed"], form.bits * columns, run),
            "weight_scale_packed": _words(stored["weight_scale_packed"], form.scale_bits * scales_a_row, run),
            "weight_scale_step": stored["weight_scale_step"][steps],
            "weight_scale_offset": stored["weight_scale_offset"],
        }
        yield run, form.decode(part, (len(run), columns), quantized.levels)


def _block_format(quantized: QuantizedTensor) -> BlockFormat:
    assert isinstance(quantized.format, BlockFormat), "other formats do not store rows one by one"
    return quantized.format


def _words(words: Tensor, bits_a_row: int, run: range) -> Tensor:
    return words[run.start * bits_a_row // WORD_BITS :][: num_words(len(run), bits_a_row)]
