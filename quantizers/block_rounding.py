"""Rounding tiles onto the levels of a codebook under block scales, with feedback inside of each tile.

A tile is as wide as a block, so its scales are searched when it has taken up all errors before it. The second
level of the scales (offset and steps) has to be known before the first tile: it comes from the weight itself.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from quantizers.block_format import BlockFormat
from quantizers.blocks import num_blocks, to_blocks
from quantizers.double_quant import DoubleQuantizedScales, double_quantize
from quantizers.packing import pack

FindScales = Callable[[Tensor, Tensor], Tensor]  # blocks and the importance of their weights -> a scale for each block
TINY = torch.finfo(torch.float32).tiny


class BlockRounder:
    """A TileRounder; `plain` gives the tensors to store once every tile is rounded."""

    def __init__(
        self,
        weight: Float32[Tensor, "out in"],
        form: BlockFormat,
        pivots: Float32[Tensor, " in"],
        find_scales: FindScales,
    ) -> None:
        size = form.block_size
        blocks = to_blocks(weight, size)
        self.form, self.shape = form, (weight.shape[0], weight.shape[1])
        self.find_scales = find_scales
        self.levels = form.levels.to(weight.device)
        self.importance = to_blocks(pivots[None], size)[0]  # 0 for the padding
        first = find_scales(blocks.reshape(-1, size), self.importance.expand(blocks.shape).reshape(-1, size))
        self.second = double_quantize(first, form.scale_bits, form.super_block)
        steps = self.second.steps.repeat_interleave(form.super_block)[: len(first)].view(blocks.shape[:2])
        self.steps = steps[None]
        self.scale_codes = torch.zeros_like(self.steps, dtype=torch.uint8)
        self.codes = torch.zeros((*self.steps.shape, size), dtype=torch.uint8, device=weight.device)

    def round_tiles(
        self,
        rows: Int64[Tensor, " tiles"],
        columns: Int64[Tensor, " tiles"],
        target: Float32[Tensor, "tiles height width"],
        right: Float32[Tensor, "tiles width width"],
    ) -> Float32[Tensor, "tiles height width"]:
        """See TileRounder: weights of a tile in turn, each one's error passed on to those after it."""
        scales = self._scales(rows, columns, target)
        codes, values = _columns_in_turn(target, scales, right, self.levels)
        self.codes[rows, :, columns] = codes
        return values

    def plain(self) -> dict[str, Tensor]:
        """The tensors of `BlockFormat.plain_specs`."""
        form, (num_rows, num_columns) = self.form, self.shape
        blocks = num_blocks(num_columns, form.block_size)
        codes = self.codes.view(-1, blocks * form.block_size)[:num_rows, :num_columns].reshape(-1)
        scale_codes = self.scale_codes.view(-1, blocks)[:num_rows].reshape(-1)
        scales = DoubleQuantizedScales(pack(scale_codes, form.scale_bits), self.second.steps, self.second.offset)
        return {"weight_packed": pack(codes, form.bits)} | scales.tensors()

    def _scales(self, rows: Tensor, columns: Tensor, target: Tensor) -> Tensor:
        """Search each block's scale and round it to one that can be stored."""
        size = self.form.block_size
        importance = self.importance[columns][:, None].expand(target.shape).reshape(-1, size)
        found = self.find_scales(target.reshape(-1, size), importance).view(target.shape[:2])
        steps = self.steps[rows, :, columns]
        codes = ((found - self.second.offset) / steps.clamp_min(TINY)).round_().clamp_(0, 2**self.form.scale_bits - 1)
        self.scale_codes[rows, :, columns] = codes.to(torch.uint8)
        return torch.addcmul(self.second.offset, codes, steps)


def _columns_in_turn(
    target: Float32[Tensor, "tiles height width"],
    scales: Float32[Tensor, "tiles height"],
    right: Float32[Tensor, "tiles width width"],
    levels: Float32[Tensor, " levels"],
) -> tuple[UInt8[Tensor, "tiles height width"], Float32[Tensor, "tiles height width"]]:
    """Codes and values; each column's error is passed on to those after it."""
    middles = (levels[1:] + levels[:-1]) / 2
    inverse = 1 / scales.clamp_min(TINY)
    work = target.clone()
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    values = torch.empty_like(target)
    last = target.shape[2] - 1
    for column in range(target.shape[2]):
        code = torch.bucketize(work[:, :, column] * inverse, middles, out_int32=True)
        value = levels[code] * scales
        codes[:, :, column], values[:, :, column] = code, value
        if column < last:
            error = target[:, :, column] - value
            work[:, :, column + 1 :] += error[:, :, None] * right[:, None, column, column + 1 :]
    return codes, values
