"""Rounding block by block under parameters (a scale, perhaps a zero-point) that are found for each block.

Without a curvature all blocks are rounded at once. With one, a tile is a block of some rows, or of all where nothing is
known of the outputs: its parameters are found when it has taken up all errors before it, and inside of it each column's
error is passed on to the next. Tiles, their rows and columns take turns as rounding_order.py says; codes and parameters
are stored in the weight's own order.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from quantizers.abstract_block_format import AbstractBlockFormat
from quantizers.block_grid import BlockGrid
from quantizers.blocks import to_blocks
from quantizers.feedback import round_with_feedback
from quantizers.kernels.switch import KERNELS
from quantizers.packing import pack
from quantizers.rounding_order import RoundingOrder, rounding_order
from quantizers.statistics import LayerStatistics
from quantizers.stored_scales import Places

# Blocks [n, block_size] and the importance of their weights (None: all alike) -> what each block asks for.
FindParameters = Callable[[Tensor, Tensor | None], Float32[Tensor, "n parameters"]]
MOST_ROWS = 16  # of a tile; more have less of one another's errors, fewer take more steps


@dataclass(frozen=True)
class BlockSides:
    """The order and the factors of the curvature of both sides.

    Attributes:
        inputs: of columns.
        outputs: of rows, in blocks of `height`; None for the identity: rows do not wait for one another.
        height: rows of a tile that go together.
    """

    inputs: RoundingOrder
    outputs: RoundingOrder | None
    height: int

    @property
    def importance(self) -> Float32[Tensor, "rows in"]:
        """What independent errors of the triangular basis weigh; one row for all where there are no `outputs`."""
        return self.inputs.pivots[None] if self.outputs is None else self.outputs.pivots[:, None] * self.inputs.pivots


Metric = Float[Tensor, "out in"] | BlockSides | None  # a Fisher diagonal, factors, or nothing known


@runtime_checkable
class BlockParameters(Protocol):
    """The parameters of all blocks as they will be stored, filled in block by block."""

    def store(self, places: Places, found: Float32[Tensor, "rows tiles parameters"]) -> BlockGrid:
        """Round the parameters of some blocks to ones that can be stored."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Named as they are stored."""
        ...


def metric_of(statistics: LayerStatistics | None, block_size: int) -> Metric:
    """What rounding block by block heeds of the statistics."""
    if statistics is None:
        return None
    if statistics.input_curvature is not None:
        return block_sides(statistics, block_size)
    return statistics.fisher_diag


def block_sides(statistics: LayerStatistics, block_size: int, alike: BlockSides | None = None) -> BlockSides:
    """Of a metric with curvature, for blocks of so many columns.

    Args:
        alike: those of the same statistics for other blocks, if there are any: their outputs are the same.
    """
    assert statistics.input_curvature is not None
    inputs = rounding_order(statistics.input_curvature, block_size)
    if alike is not None:
        return replace(alike, inputs=inputs)
    if statistics.output_curvature is None:
        return BlockSides(inputs, None, 1)
    num_rows = len(statistics.output_curvature)
    height = max(rows for rows in range(1, MOST_ROWS + 1) if num_rows % rows == 0)
    return BlockSides(inputs, rounding_order(statistics.output_curvature, 1).in_blocks(height), height)


def round_blocks(
    weight: Float32[Tensor, "out in"],
    metric: Metric,
    form: AbstractBlockFormat,
    find: FindParameters,
    parameters_of: Callable[[Float32[Tensor, "out blocks parameters"]], BlockParameters],
) -> dict[str, Tensor]:
    """Codes and parameters as they are stored.

    Args:
        metric: see `metric_of`.
        find: what each block asks for.
        parameters_of: makes the place for all parameters, from what the blocks of `weight` itself ask for.
    """
    first = first_parameters(weight, metric, form.block_size, find)
    parameters = parameters_of(first)
    codes = codes_under(weight, metric, form.block_size, find, first, parameters)
    return {"weight_packed": pack(codes, form.bits)} | parameters.tensors()


def first_parameters(
    weight: Float32[Tensor, "out in"], metric: Metric, block_size: int, find: FindParameters
) -> Float32[Tensor, "out blocks parameters"]:
    """What the blocks of `weight` itself ask for."""
    blocks = to_blocks(weight, block_size)
    weights = metric.inputs.pivots.expand(weight.shape) if isinstance(metric, BlockSides) else metric
    if weights is None and weight.shape[1] % block_size:
        weights = torch.ones_like(weight)  # and 0 for the padding, which must not count
    importance = None if weights is None else to_blocks(weights, block_size).reshape(-1, block_size)
    return find(blocks.reshape(-1, block_size), importance).view(*blocks.shape[:2], -1)


def codes_under(
    weight: Float32[Tensor, "out in"],
    metric: Metric,
    block_size: int,
    find: FindParameters,
    first: Float32[Tensor, "out blocks parameters"],
    parameters: BlockParameters,
) -> UInt8[Tensor, " weights"]:
    """Codes row by row; the parameters that they are under are left in `parameters`."""
    blocks = to_blocks(weight, block_size)
    if isinstance(metric, BlockSides):
        codes = torch.zeros_like(blocks, dtype=torch.uint8)
        rounder = _BlockRounder(metric, block_size, find, parameters, codes)
        ordered, outputs = weight[:, metric.inputs.places], None
        if metric.outputs is not None:
            ordered, outputs = ordered[metric.outputs.places], metric.outputs.factor
        round_with_feedback(ordered, outputs, metric.inputs.factor, (metric.height, block_size), rounder)
    else:
        codes, _ = parameters.store(..., first).round(blocks)
    return codes.flatten(1)[:, : weight.shape[1]].reshape(-1)


class _BlockRounder:
    """A TileRounder for tiles of whole blocks, in another order than the weight's."""

    def __init__(
        self,
        sides: BlockSides,
        size: int,
        find: FindParameters,
        parameters: BlockParameters,
        codes: UInt8[Tensor, "out blocks block_size"],
    ) -> None:
        self.find, self.parameters, self.codes = find, parameters, codes
        order, num_rows = sides.inputs, len(codes)
        self.importance = to_blocks(order.factor.pivots[None], size)[0]
        columns = to_blocks(order.places[None], size)[0]  # of each tile; 0 for the padding of the last
        if sides.outputs is None:
            self.rows = torch.arange(num_rows, device=columns.device)[None]
        else:
            self.rows = sides.outputs.places.view(-1, sides.height)  # of each tile
        self.blocks = columns[:, 0] // size
        places = torch.arange(size, device=columns.device)
        padding = torch.arange(columns.numel(), device=columns.device).view_as(columns) >= len(order.places)
        self.places = torch.where(padding, places, columns % size)  # of a tile's columns in their block

    def round_tiles(
        self,
        rows: Int64[Tensor, " tiles"],
        columns: Int64[Tensor, " tiles"],
        target: Float32[Tensor, "tiles height width"],
        right: Float32[Tensor, "tiles width width"],
    ) -> Float32[Tensor, "tiles height width"]:
        """See TileRounder: weights of a tile in turn, each one's error passed on to those after it."""
        target = target.transpose(0, 1).contiguous()  # [height, tiles, width]
        size = target.shape[2]
        importance = self.importance[columns].expand(target.shape)
        found = self.find(target.reshape(-1, size), importance.reshape(-1, size)).view(*target.shape[:2], -1)
        at = self.rows[rows].T, self.blocks[columns]
        codes, values = _columns_in_turn(target, self.parameters.store(at, found), right)
        self.codes[at[0][:, :, None], at[1][:, None], self.places[columns]] = codes
        return values.transpose(0, 1)


def _columns_in_turn(
    target: Float32[Tensor, "height tiles width"],
    grid: BlockGrid,
    right: Float32[Tensor, "tiles width width"],
) -> tuple[UInt8[Tensor, "height tiles width"], Float32[Tensor, "height tiles width"]]:
    """Codes and values; each column's error is passed on to those after it."""
    if KERNELS.serves(target):
        found = KERNELS.attempt(lambda: _by_kernel(target, grid, right))
        if found is not None:
            return found
    work = target.clone()
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    values = torch.empty_like(target)
    last = target.shape[2] - 1
    for column in range(target.shape[2]):
        here = slice(column, column + 1)
        codes[:, :, here], values[:, :, here] = grid.round(work[:, :, here])
        if column < last:
            error = target[:, :, here] - values[:, :, here]
            work[:, :, column + 1 :] += error * right[:, column, column + 1 :]
    return codes, values


def _by_kernel(target: Tensor, grid: BlockGrid, right: Tensor) -> tuple[Tensor, Tensor]:
    from quantizers.kernels.column_feedback import columns_in_turn  # it imports Triton

    return columns_in_turn(target, grid, right)
