"""Rounding with error feedback: each tile of a weight is rounded after it has taken up the errors before it.

With H_O = V diag(dO) V^T and H_I = U diag(dI) U^T (curvature.py) and X = V^T E, the target of the tile in rows r and
columns c is

    T[r, c] = W[r, c] + sum of V[r', r]^T E[r', c'] U[c', c] over r' <= r and c' <= c, without the tile itself

and what rounding leaves of it, E' = T - Q up to terms within the tile, is all that the loss sees. Tiles on one
anti-diagonal do not depend on one another and are rounded together. Without H_O rows are independent, and one
tile is as high as the weight. This is GPTQ (arXiv:2210.17323) for V = 1 and tiles of one column, and LDLQ with two
Hessians (YAQA, arXiv:2505.22988) otherwise.
"""

from typing import Protocol

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from quantizers.curvature import Triangular


class TileRounder(Protocol):
    """What a quantizer does with tiles; it keeps codes and scales to itself."""

    def round_tiles(
        self,
        rows: Int64[Tensor, " tiles"],
        columns: Int64[Tensor, " tiles"],
        target: Float32[Tensor, "tiles height width"],
        below: Float32[Tensor, "tiles height height"] | None,
        right: Float32[Tensor, "tiles width width"],
    ) -> Float32[Tensor, "tiles height width"]:
        """Rounded values of each tile.

        Args:
            rows, columns: each tile's place, counted in tiles.
            target: what to approximate.
            below, right: the tile's own blocks of V and U, unit upper triangular, for feedback inside of it.
        """
        ...


def round_with_feedback(
    weight: Float32[Tensor, "out in"],
    outputs: Triangular | None,
    inputs: Triangular,
    tile: tuple[int, int],
    rounder: TileRounder,
) -> Float32[Tensor, "out in"]:
    """Round `weight`, padded with zeros to whole tiles, tile by tile; returns Q of the padded shape.

    Args:
        outputs, inputs: factors of H_O (None: the identity) and H_I, of the weight's own size.
        tile: height and width of a tile; without `outputs` all rows go together, as one tile.
    """
    height, width = tile
    if outputs is None:  # rows do not wait for one another
        height *= -(-weight.shape[0] // height)
    padded = _pad(weight, height, width)
    num_rows, num_columns = padded.shape[0] // height, padded.shape[1] // width
    upper = _pad_unit(inputs.unit_upper, padded.shape[1])
    upper_columns = upper.view(-1, num_columns, width).transpose(0, 1).contiguous()  # [columns, in, width]
    right = torch.stack([upper_columns[c, c * width : (c + 1) * width] for c in range(num_columns)])
    lower_rows = below = None
    if outputs is not None:
        lower_rows = _pad_unit(outputs.unit_upper, padded.shape[0]).T.reshape(
            num_rows, height, -1
        )  # [rows, height, out]
        below = torch.stack([lower_rows[r, :, r * height : (r + 1) * height].T for r in range(num_rows)])
    tiles = padded.view(num_rows, height, num_columns, width).transpose(1, 2)  # [rows, columns, height, width]
    values = torch.zeros_like(tiles, memory_format=torch.contiguous_format)
    errors = padded.new_zeros(num_columns, padded.shape[0], width)  # E, by columns of tiles
    carried = padded.new_zeros(num_rows, height, padded.shape[1])  # X = V^T E, by rows of tiles
    for diagonal in range(num_rows + num_columns - 1):
        rows = torch.arange(max(0, diagonal - num_columns + 1), min(num_rows, diagonal + 1), device=weight.device)
        columns = diagonal - rows
        target = tiles[rows, columns]
        own = None if lower_rows is None else lower_rows[rows] @ errors[columns]
        here = carried.view(num_rows, height, num_columns, width)
        if own is not None:
            here[rows, :, columns] = own
        rounded = rounder.round_tiles(
            rows,
            columns,
            target + carried[rows] @ upper_columns[columns],
            None if below is None else below[rows],
            right[columns],
        )
        values[rows, columns] = rounded
        error = target - rounded
        if own is not None and below is not None:
            errors.view(num_columns, num_rows, height, width)[columns, rows] = error
            here[rows, :, columns] = own + below[rows].mT @ error
        else:
            here[rows, :, columns] = error
    return values.transpose(1, 2).reshape(padded.shape)


def _pad(weight: Tensor, height: int, width: int) -> Tensor:
    rows, columns = weight.shape
    return torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))


def _pad_unit(unit_upper: Tensor, size: int) -> Tensor:
    padded = torch.eye(size, device=unit_upper.device)
    padded[: len(unit_upper), : len(unit_upper)] = unit_upper
    return padded
