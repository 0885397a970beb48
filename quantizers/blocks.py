"""[out, in] <-> [out, blocks, block_size]: rows are cut into blocks, the last one padded with zeros.

A block never crosses a row, so a matrix of any width works; the padding exists only while quantizing
and is never stored.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def num_blocks(num_columns: int, block_size: int) -> int:
    """Blocks in one row of `num_columns` columns."""
    return -(-num_columns // block_size)


def to_blocks(matrix: Shaped[Tensor, "out in"], block_size: int) -> Shaped[Tensor, "out blocks block_size"]:
    """Cut the rows into blocks, the last one padded with zeros."""
    rows, columns = matrix.shape
    blocks = num_blocks(columns, block_size)
    if blocks * block_size != columns:
        matrix = torch.nn.functional.pad(matrix, (0, blocks * block_size - columns))
    return matrix.reshape(rows, blocks, block_size)


def spread(scales: Float[Tensor, "out blocks"], block_size: int, num_columns: int) -> Float[Tensor, "out in"]:
    """Each block's scale, repeated for its columns."""
    return scales.repeat_interleave(block_size, dim=1)[:, :num_columns]
