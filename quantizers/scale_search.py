"""The scale of each block that minimises the weighted squared error, not the one of the largest weight.

For a block w with weights f and levels q the error sum f (w - s q[c])^2 is searched over a few multiples
of the block's largest magnitude; each trial is polished by one least-squares step, s = sum f w q / sum f q^2,
the exact optimum for its codes. At 2 bits this is worth half of the squared error against absmax scaling.
"""

import torch
from jaxtyping import Float32
from torch import Tensor

from quantizers.kernels.switch import KERNELS

BINS = 1024  # of the look-up table from a scaled weight to its level
CHUNK = {"cpu": 2**16, "cuda": 2**22}  # weights at a time: they stay in a processor's cache, and keep a GPU busy
# Multiples of the largest magnitude that are tried; the optimum for normal weights lies at 0.5 ... 0.7
# for 2 bits and near 1 for 8.
MULTIPLES = {2: (0.35, 0.45, 0.55, 0.65, 0.8, 1.0), 3: (0.55, 0.65, 0.75, 0.85, 1.0), 4: (0.7, 0.8, 0.9, 1.0)}
FINE_MULTIPLES = (0.9, 0.96, 1.0)
SMALLEST_SCALE = 1e-30  # below it a block counts as zeros while searching: 1 / scale would overflow


def search_scales(
    blocks: Float32[Tensor, "blocks block_size"],
    weights: Float32[Tensor, "blocks block_size"] | None,
    levels: Float32[Tensor, " levels"],
) -> Float32[Tensor, " blocks"]:
    """The best non-negative scale of each block; 0 for a block of zeros.

    Args:
        blocks: padded with zeros where a block is short.
        weights: non-negative, same shape; all ones if None, and for a block where all are zero.
        levels: ascending in [-1, 1].
    """
    table = _table(levels)
    multiples = MULTIPLES.get(len(levels).bit_length() - 1, FINE_MULTIPLES)
    if KERNELS.serves(blocks):
        found = KERNELS.attempt(lambda: _by_kernel(blocks, weights, table, multiples))
        if found is not None:
            return found
    if weights is not None:
        weights = torch.where(weights.amax(dim=1, keepdim=True) > 0, weights, 1.0)
    rows = rows_at_once(blocks)
    chunks = zip(blocks.split(rows), weights.split(rows) if weights is not None else [None] * len(blocks), strict=False)
    return torch.cat([_search(block, weight, table, multiples) for block, weight in chunks])


def _by_kernel(blocks: Tensor, weights: Tensor | None, table: Tensor, multiples: tuple[float, ...]) -> Tensor:
    from quantizers.kernels.scale_search import search_scales as search  # it imports Triton

    # without waiting for the copy: so few bytes are taken from here before the call is over
    tried = torch.tensor(multiples, dtype=torch.float32).to(blocks.device, non_blocking=True)
    return search(blocks, weights, table, tried, SMALLEST_SCALE)


def rows_at_once(blocks: Float32[Tensor, "blocks block_size"]) -> int:
    """How many blocks are searched together."""
    return max(1, CHUNK.get(blocks.device.type, CHUNK["cpu"]) // blocks.shape[1])


def nearest(values: Tensor, levels: Float32[Tensor, " levels"]) -> Tensor:
    """Index of the level nearest to each value, as uint8."""
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)


def _table(levels: Tensor) -> Tensor:
    return levels[nearest(torch.linspace(-1, 1, BINS, device=levels.device), levels).long()]


def _search(block: Tensor, weight: Tensor | None, table: Tensor, multiples: tuple[float, ...]) -> Tensor:
    largest = block.abs().amax(dim=1)
    block = block / torch.where(largest > 0, largest, 1.0)[:, None]  # so that no square over- or underflows
    weighted = block if weight is None else block * weight
    best_gain = torch.full_like(largest, -torch.inf)
    best_scale = torch.ones_like(largest)
    for multiple in multiples:
        scale = torch.full_like(largest, multiple)
        for _ in range(2):  # the trial, then its polished scale
            level = _level(block, scale, table)
            dot = (weighted * level).sum(dim=1)
            norm = (level.square() if weight is None else level.square() * weight).sum(dim=1)
            # sum f w^2 - error = 2 s dot - s^2 norm
            gain = scale * (2 * dot - scale * norm)
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best_scale = torch.where(better, scale, best_scale)
            scale = torch.where(norm > 0, dot / norm.clamp_min(1e-38), scale).clamp_min(0)
    return best_scale * largest


def _level(block: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    half = (BINS - 1) / 2
    inverse = torch.where(scale > SMALLEST_SCALE, half / scale, 0)[:, None]
    index = (block * inverse).add_(half + 0.5).clamp_(0, BINS - 1).int()
    return table.index_select(0, index.reshape(-1)).view(block.shape)
