"""Levels that codes stand for, ascending in [-1, 1], float32.

normal_float  quantiles of the normal distribution (QLoRA, arXiv:2305.14314; widths other than 4 as in
              LQ-LoRA, arXiv:2311.12023); it has an exact 0, exact ends, and one level more above 0
lloyd_max     the levels of least squared error for the normal distribution (Lloyd 1982, Max 1960), divided
              by the largest: at 2 bits a third of NormalFloat's squared error, at 4 bits a fifth less
"""

import functools

import numpy as np
import torch
from jaxtyping import Float32
from scipy.special import ndtr, ndtri  # the normal distribution; scipy.stats has it too, and takes a second to import
from torch import Tensor

# QLoRA's offset for 4 bits, kept for every width as LQ-LoRA does: the mean of 1 - 1/32 and 1 - 1/30.
NORMAL_FLOAT_OFFSET = 0.9677083


@functools.cache
def normal_float(bits: int) -> Float32[Tensor, " levels"]:
    """The 2**bits levels of NormalFloat; for 4 bits equal to the published NF4 bit for bit."""
    half = 2 ** (bits - 1)
    # float32 probabilities from torch.linspace, as in the published construction: a float64 grid
    # differs from the published levels in the last bit.
    positive = ndtri(torch.linspace(NORMAL_FLOAT_OFFSET, 0.5, half + 1)[:-1].numpy())
    negative = -ndtri(torch.linspace(NORMAL_FLOAT_OFFSET, 0.5, half)[:-1].numpy())
    levels = torch.tensor(np.sort(np.concatenate([positive, [0.0], negative])), dtype=torch.float32)
    return levels / levels.max()


@functools.cache
def lloyd_max(bits: int) -> Float32[Tensor, " levels"]:
    """The 2**bits levels of least squared error for a normal variable, the largest scaled to 1.

    Solves Lloyd's two conditions, boundaries half-way and levels at the mean of their cell, by Newton's
    method on the tridiagonal system (plain iteration needs tens of thousands of rounds at 8 bits).
    """
    n = 2**bits
    levels = ndtri((np.arange(n) + 0.5) / n) * (np.sqrt(3) if bits > 3 else 1.2)  # the point density p^(1/3)
    for _ in range(200):
        mean, jacobian = _cell_means(levels)
        step = np.linalg.solve(np.eye(n) - jacobian, mean - levels)
        levels = _ascending(levels, step)
        if np.abs(step).max() < 1e-9:  # the next step would be rounding noise, 1e-11 at 8 bits
            break
    levels = (levels - levels[::-1]) / 2  # exactly odd
    return torch.tensor(levels / levels[-1], dtype=torch.float32)


def _ascending(levels: np.ndarray, step: np.ndarray) -> np.ndarray:
    size = 1.0
    while np.any(np.diff(levels + size * step) <= 0):
        size /= 2
    return levels + size * step


def _cell_means(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each level's cell, and its derivative with respect to the levels."""
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    density, mass = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi), np.diff(ndtr(edges))
    mean = -np.diff(density) / mass
    finite = np.where(np.isfinite(edges), edges, 0.0)
    by_low = density[:-1] * (mean - finite[:-1]) / mass  # d mean / d lower edge
    by_high = density[1:] * (finite[1:] - mean) / mass
    jacobian = np.diag((by_low + by_high) / 2)  # an edge moves by half of each neighbour
    jacobian += np.diag(by_low[1:] / 2, -1) + np.diag(by_high[:-1] / 2, 1)
    return mean, jacobian
