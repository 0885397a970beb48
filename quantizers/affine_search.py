"""The scale and zero-point of each block that minimise the weighted squared error of integer codes.

    W ~ (code - zero) * scale,   code and zero in 0 ... 2**bits - 1

A few multiples of the scale that just spans the block are tried, each with the two zero-points next to the one that
would centre the codes' range on the block's, and polished by one least-squares step for the scale, as in
scale_search.py.
"""

import torch
from jaxtyping import Float32
from torch import Tensor

from quantizers.scale_search import rows_at_once

# Multiples of the block's range over the codes' range; normal weights want about 0.7 at 2 bits and 1 at 8.
MULTIPLES = {2: (0.4, 0.5, 0.6, 0.7, 0.85, 1.0), 3: (0.6, 0.7, 0.8, 0.9, 1.0), 4: (0.75, 0.85, 0.95, 1.0)}
FINE_MULTIPLES = (0.9, 0.96, 1.0)


def search_affine(
    blocks: Float32[Tensor, "blocks block_size"],
    weights: Float32[Tensor, "blocks block_size"] | None,
    bits: int,
) -> Float32[Tensor, "blocks 2"]:
    """The best scale, not negative and 0 for a block of zeros, and the zero-point of each block.

    Args:
        blocks: padded with zeros where a block is short.
        weights: non-negative, same shape; all ones if None, and for a block where all are zero.
    """
    weights = torch.ones_like(blocks) if weights is None else weights
    weights = torch.where(weights.amax(dim=1, keepdim=True) > 0, weights, 1.0)
    rows = rows_at_once(blocks)
    chunks = zip(blocks.split(rows), weights.split(rows), strict=True)
    return torch.cat([_search(block, weight, bits) for block, weight in chunks])


def _search(block: Tensor, weight: Tensor, bits: int) -> Float32[Tensor, "blocks 2"]:
    largest = block.abs().amax(dim=1)
    block = block / torch.where(largest > 0, largest, 1.0)[:, None]  # so that no square over- or underflows
    low, high = block.amin(dim=1).clamp_max(0), block.amax(dim=1).clamp_min(0)
    top = 2**bits - 1
    spans = torch.where(largest > 0, (high - low) / top, 1.0)
    weighted = block * weight
    best_gain = torch.full_like(largest, -torch.inf)
    best_scale, best_zero = torch.ones_like(largest), torch.zeros_like(largest)
    for multiple in MULTIPLES.get(bits, FINE_MULTIPLES):
        centred = top / 2 - (low + high) / (2 * multiple * spans)
        for zero in (centred.floor().clamp(0, top), centred.ceil().clamp(0, top)):
            scale = multiple * spans
            for _ in range(2):  # the trial, then its polished scale
                level = round_affine(block, scale[:, None], zero[:, None], top)
                dot = (weighted * level).sum(dim=1)
                norm = (level.square() * weight).sum(dim=1)
                # sum f w^2 - error = 2 s dot - s^2 norm
                gain = scale * (2 * dot - scale * norm)
                better = gain > best_gain
                best_gain = torch.where(better, gain, best_gain)
                best_scale = torch.where(better, scale, best_scale)
                best_zero = torch.where(better, zero, best_zero)
                scale = torch.where(norm > 0, dot / norm.clamp_min(1e-38), scale).clamp_min(0)
    return torch.stack([best_scale * largest, best_zero], dim=1)


def round_affine(weights: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """code - zero of the nearest code, in floats."""
    level = (weights / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    return torch.minimum(torch.maximum(level, -zero), top - zero)
