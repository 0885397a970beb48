"""Blocks of numbers as integers -q ... q times one bfloat16 scale, q = 2**(bits - 1) - 1.

Zero is a level: a dead row stays dead, and few numbers of a block are large. (An even number of levels without a
zero was tried: worse at 4 bits on every kind of factor.) The scale is searched, since the largest number seldom
deserves an exact level at 4 bits.
"""

from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float32, Int32
from torch import Tensor

# Of the scale that just reaches the largest number; below 0.15 only blocks with one huge number would want to be.
MULTIPLES = tuple(0.15 * (1 / 0.15) ** (k / 19) for k in range(20))


@dataclass(frozen=True)
class UniformBlocks:
    """`codes` in -q ... q and the scale of each block; a block of zeros has scale 0."""

    codes: Int32[Tensor, "blocks block_size"]
    scales: BFloat16[Tensor, " blocks"]


def largest_code(bits: int) -> int:
    """q."""
    return 2 ** (bits - 1) - 1


def quantize_uniform(
    blocks: Float32[Tensor, "blocks block_size"], weights: Float32[Tensor, "blocks block_size"] | None, bits: int
) -> UniformBlocks:
    """Codes and scales that minimise sum weights * (block - scale * code)^2 of each block.

    Each trial scale is polished by one least-squares step, the optimum for its codes; scales are rounded to
    bfloat16 before the codes are chosen for them.

    Args:
        blocks: finite; padded with zeros where a block is short.
        weights: non-negative; all ones if None.
    """
    weights = torch.ones_like(blocks) if weights is None else weights
    largest = blocks.abs().amax(dim=1)
    unit = torch.where(largest > 0, largest, 1.0)[:, None]  # so that no square over- or underflows
    just_reaches = largest / largest_code(bits)
    best_error = torch.full_like(just_reaches, torch.inf)
    best_scale = torch.zeros_like(just_reaches, dtype=torch.bfloat16)
    for multiple in MULTIPLES:
        scale = just_reaches * multiple
        for _ in range(2):  # the trial, then its polished scale
            rounded = scale.to(torch.bfloat16)
            codes = _nearest(blocks, rounded, bits)
            error = (weights * ((blocks - codes * rounded.float()[:, None]) / unit).square()).sum(dim=1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, rounded, best_scale)
            norm = (weights * codes.square()).sum(dim=1)
            scale = torch.where(norm > 0, (weights * blocks * codes).sum(dim=1) / norm.clamp_min(1e-38), scale)
    return UniformBlocks(_nearest(blocks, best_scale, bits).int(), best_scale)


def _nearest(blocks: Tensor, scales: Tensor, bits: int) -> Tensor:
    q = largest_code(bits)
    scales = scales.float()[:, None]
    return torch.where(scales > 0, blocks / scales, 0).round().clamp(-q, q)
