"""Rounding with error feedback: each tile of a weight is rounded after it has taken up the errors before it.

With H_O = V diag(dO) V^T and H_I = U diag(dI) U^T (curvature.py) and X = V^T E, the target of the tile in rows r and
columns c is

    T[r, c] = W[r, c] + S U[c, c]^-1,   S = sum of V[r', r]^T E[r', c'] U[c', c] over r' <= r and c' <= c, without
                                        the tile itself

and what rounding leaves, E' = (T - Q) U[c, c] = (W - Q) U[c, c] + S, is all that the loss sees: a rounder that passes
errors T - Q on from column to column by U[c, c] makes it small entry by entry. V[r, r] is the identity, see
`Triangular.in_blocks`. Tiles on one anti-diagonal do not depend on one another and are rounded together. Without H_O
rows are independent, and one tile is as high as the weight. This is GPTQ (arXiv:2210.17323) for V = 1 and tiles of one
column, and LDLQ with two Hessians (YAQA, arXiv:2505.22988) otherwise.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from quantizers.curvature import Triangular


@runtime_checkable
class TileRounder(Protocol):
    """What a quantizer does with tiles; it keeps codes and scales to itself."""

    def round_tiles(
        self,
        rows: Int64[Tensor, " tiles"],
        columns: Int64[Tensor, " tiles"],
        target: Float32[Tensor, "tiles height width"],
        right: Float32[Tensor, "tiles width width"],
    ) -> Float32[Tensor, "tiles height width"]:
        """Rounded values of each tile.

        Args:
            rows, columns: each tile's place, counted in tiles.
            target: what to approximate, so that (target - values) @ right is small in every entry.
            right: the tile's own block of U, unit upper triangular, for feedback from column to column inside of it.
        """
        ...


def round_with_feedback(
    weight: Float32[Tensor, "out in"],
    outputs: Triangular | None,
    inputs: Triangular,
    tile: tuple[int, int],
    rounder: TileRounder,
) -> Float32[Tensor, "out in"]:
    """Round `weight`, padded with zeros to whole tiles, tile by tile; returns Q without the padding.

    Args:
        outputs, inputs: factors of H_O (None: the identity), in blocks of a tile's height, and of H_I.
        tile: height and width of a tile; without `outputs` all rows go together, as one tile.
    """
    height, width = tile
    if outputs is None:  # rows do not wait for one another
        height *= -(-weight.shape[0] // height)
    padded = _pad(weight, height, width)
    num_rows, num_columns = padded.shape[0] // height, padded.shape[1] // width
    # Tiles of a diagonal go together. With the columns' order turned round they are a diagonal of memory: no copies.
    tiles = padded.view(num_rows, height, num_columns, width).flip(2)  # [row, height, column, width]
    upper = _pad_unit(inputs.unit_upper, padded.shape[1]).view(num_columns, width, num_columns, width).flip(0, 2)
    own = upper.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()  # U's blocks of a tile [column, width, width]
    upper = upper.permute(2, 0, 1, 3).reshape(num_columns, -1, width)  # U [column, in, width]
    is_solved = torch.equal(own, torch.eye(width, device=own.device).expand_as(own))
    lower = None
    if outputs is not None:
        lower = _pad_unit(outputs.unit_upper, padded.shape[0]).T  # V^T [row, height, out]
        lower = lower.reshape(num_rows, height, -1)
    values, passed = torch.zeros_like(tiles), torch.zeros_like(tiles)  # Q, X = V^T E
    errors = padded.new_zeros(num_columns, num_rows * height, width)  # E [column, out, width]
    errors_by_row = errors.view(num_columns, num_rows, height, width).permute(1, 2, 0, 3)
    for offset in range(num_columns - 1, -num_rows, -1):
        first = max(0, -offset)
        count = min(num_rows, num_columns - offset) - first
        rows, columns = slice(first, first + count), slice(first + offset, first + offset + count)
        above, before = (first + count) * height, (first + offset) * width  # errors of other tiles are still zero
        if lower is not None:
            _diagonal(passed, offset).copy_(lower[rows, :, :above] @ errors[columns, :above])
        taken_up = passed[rows].flatten(2)[:, :, before:] @ upper[columns, before:]
        if not is_solved:
            block = own[columns]
            taken_up = torch.linalg.solve_triangular(block, taken_up, upper=True, left=False, unitriangular=True)
        weights = _diagonal(tiles, offset)
        row_numbers = torch.arange(first, first + count, device=weight.device)
        column_numbers = num_columns - 1 - offset - row_numbers
        found = rounder.round_tiles(row_numbers, column_numbers, weights + taken_up, own[columns])
        _diagonal(values, offset).copy_(found)
        error = weights - found
        _diagonal(errors_by_row, offset).copy_(error)
        _diagonal(passed, offset).add_(error)  # V is the identity within a tile
    return values.flip(2).reshape(padded.shape)[: weight.shape[0], : weight.shape[1]]


def _diagonal(
    tiles: Float32[Tensor, "rows height columns width"], offset: int
) -> Float32[Tensor, "tiles height width"]:
    """A view of the tiles (i, i + offset)."""
    return tiles.diagonal(offset, 0, 2).permute(2, 0, 1)


def _pad(weight: Tensor, height: int, width: int) -> Tensor:
    rows, columns = weight.shape
    return torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))


def _pad_unit(unit_upper: Tensor, size: int) -> Tensor:
    padded = torch.eye(size, device=unit_upper.device)
    padded[: len(unit_upper), : len(unit_upper)] = unit_upper
    return padded
