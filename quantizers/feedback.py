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
    upper = _pad_unit(inputs.unit_upper, padded.shape[1])
    upper = upper.view(-1, num_columns, width).transpose(0, 1).contiguous()  # U [columns, in, width]
    lower = None
    if outputs is not None:
        lower = _pad_unit(outputs.unit_upper, padded.shape[0]).T  # V^T [rows, height, out]
        lower = lower.reshape(num_rows, height, -1)
    tiles = padded.view(num_rows, height, num_columns, width).transpose(1, 2)  # [rows, columns, height, width]
    values = torch.zeros_like(tiles, memory_format=torch.contiguous_format)
    errors = padded.new_zeros(num_columns, num_rows, height, width)  # E
    passed = padded.new_zeros(num_rows, height, num_columns, width)  # X = V^T E
    for diagonal in range(num_rows + num_columns - 1):
        rows = torch.arange(max(0, diagonal - num_columns + 1), min(num_rows, diagonal + 1), device=weight.device)
        columns = diagonal - rows
        if lower is not None:  # from the rows above; the tile's own error is still zero
            passed[rows, :, columns] = lower[rows] @ errors[columns].flatten(1, 2)
        taken_up = passed[rows].flatten(2) @ upper[columns]
        own = upper.view(num_columns, num_columns, width, width)[columns, columns]
        taken_up = torch.linalg.solve_triangular(own, taken_up, upper=True, left=False, unitriangular=True)
        values[rows, columns] = rounder.round_tiles(rows, columns, tiles[rows, columns] + taken_up, own)
        error = tiles[rows, columns] - values[rows, columns]
        errors[columns, rows] = error
        passed[rows, :, columns] += error  # V is the identity within a tile
    return values.transpose(1, 2).reshape(padded.shape)[: weight.shape[0], : weight.shape[1]]


def _pad(weight: Tensor, height: int, width: int) -> Tensor:
    rows, columns = weight.shape
    return torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))


def _pad_unit(unit_upper: Tensor, size: int) -> Tensor:
    padded = torch.eye(size, device=unit_upper.device)
    padded[: len(unit_upper), : len(unit_upper)] = unit_upper
    return padded
