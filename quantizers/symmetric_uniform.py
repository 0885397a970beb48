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
BLOCKS_AT_ONCE = 32  # with all trials of a block of 128 in 330 kB: a core's cache


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
    at_once = zip(blocks.split(BLOCKS_AT_ONCE), weights.split(BLOCKS_AT_ONCE), strict=True)
    scales = torch.cat([_best_scales(*some, bits) for some in at_once])
    return UniformBlocks(_nearest(blocks, scales, bits).int(), scales)


def _best_scales(blocks: Tensor, weights: Tensor, bits: int) -> Tensor:
    """bfloat16 [blocks]; of trials that are equally good the first."""
    largest = blocks.abs().amax(dim=1)
    unit = torch.where(largest > 0, largest, 1.0)[:, None]  # so that no square over- or underflows
    trial = largest / largest_code(bits) * torch.tensor(MULTIPLES, device=blocks.device)[:, None]
    tried, errors = [], []
    for _ in range(2):  # the trials, then their polished scales
        rounded = trial.to(torch.bfloat16)
        codes = _nearest(blocks, rounded, bits)
        tried.append(rounded)
        errors.append((weights * ((blocks - codes * rounded.float()[..., None]) / unit).square()).sum(dim=-1))
        norm = (weights * codes.square()).sum(dim=-1)
        trial = torch.where(norm > 0, (weights * blocks * codes).sum(dim=-1) / norm.clamp_min(1e-38), trial)
    error, scales = torch.stack(errors, dim=1).flatten(0, 1), torch.stack(tried, dim=1).flatten(0, 1)
    numbers = torch.arange(len(error), device=error.device)[:, None]
    first = torch.where(error == error.amin(dim=0), numbers, len(error) - 1).amin(dim=0)
    return scales.gather(0, first[None])[0]


def _nearest(blocks: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Codes as floats, for each of the scales [..., blocks]."""
    q = largest_code(bits)
    scales = scales.float()[..., None]
    return torch.where(scales > 0, blocks / scales, 0).round().clamp(-q, q)
