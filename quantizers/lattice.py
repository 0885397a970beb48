"""A code of 2**16 points of the E8 lattice, moved by 1/4: 2 bits a weight for 8 normal weights at once.

The construction of E8P (QuIP#, Tseng et al. 2024, arXiv:2402.04396, section 4.2). A point is

    +-pattern, with a sign for each of 8 coordinates, then 1/4 added to or taken from all of them

where a pattern is one of 256 vectors of 1/2, 3/2, 5/2 ..., and signs are such that the sum is even; so seven of
them tell the eighth. Patterns: all 227 of squared norm at most 10, and 29 of the next shell, 12.

    byte 0    pattern
    byte 1    bits 0 to 6: 1 where coordinates 0 to 6 are negative; bit 7: 1 where 1/4 is taken off

Legend: n (vectors of 8 weights).
"""

import functools
import itertools

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor

DIMENSION = 8
QUARTER = 0.25
CHUNK = 2**13  # vectors at a time: what they need stays in the processor's cache
LAST_SHELL = 29  # patterns of squared norm 12, five coordinates of 3/2 each


@functools.cache
def lattice_patterns() -> Float32[Tensor, "256 8"]:
    """Absolute values, in lexicographic order shell by shell."""
    vectors = np.array(list(itertools.product((0.5, 1.5, 2.5), repeat=DIMENSION)), dtype=np.float32)
    norms = np.square(vectors).sum(axis=1)
    shells = [vectors[norms == norm] for norm in (2, 4, 6, 8, 10)]
    five = vectors[(norms == 12) & (vectors.max(axis=1) == 1.5)]
    spread = np.linspace(0, len(five) - 1, LAST_SHELL).round().astype(int)
    return _constant(np.concatenate([*shells, five[spread]]))


def _constant(values: np.ndarray) -> Tensor:
    """For a cache: on the CPU and an ordinary tensor, whatever a caller's default device or inference mode."""
    with torch.inference_mode(False):
        return torch.from_numpy(values)


def lattice_decode(codes: UInt8[Tensor, "n 2"], patterns: Float32[Tensor, "256 8"]) -> Float32[Tensor, "n 8"]:
    """The points that codes made by `lattice_encode` stand for."""
    sizes = patterns[codes[:, 0].int()]
    bits = (codes[:, 1:].int() >> torch.arange(DIMENSION, device=codes.device)) & 1
    signs = bits[:, :7]
    eighth = (signs.sum(dim=1, keepdim=True) + sizes.sum(dim=1, keepdim=True).int()) % 2  # sizes' sum is whole
    return sizes * (1 - 2 * torch.cat([signs, eighth], dim=1)) + QUARTER * (1 - 2 * bits[:, 7:])


def lattice_encode(vectors: Float32[Tensor, "n 8"]) -> UInt8[Tensor, "n 2"]:
    """The code of the point nearest to each vector.

    Exact, by the structure of the code. With a = |vector -+ 1/4|, the best signs are those of the vector; where their
    parity is wrong for a pattern, the coordinate of least a * pattern changes its sign. The patterns of the first
    five shells are all permutations of seven vectors, so the best permutation pairs the largest a with the largest
    size, and the coordinate to change is the smallest a. The last shell's patterns are tried one by one.
    """
    if not len(vectors):
        return torch.empty(0, 2, dtype=torch.uint8, device=vectors.device)
    tables = _tables()
    return torch.cat([_encode(part, *(table.to(vectors.device) for table in tables)) for part in vectors.split(CHUNK)])


@functools.cache
def _tables() -> tuple[Tensor, Tensor, Tensor]:
    """Seven descending patterns, those of the last shell, and the index of a pattern by its digits in base 3."""
    patterns = lattice_patterns()
    whole = patterns[:-LAST_SHELL].numpy()
    index = np.zeros(3**DIMENSION, dtype=np.uint8)
    index[_digits(patterns).numpy()] = np.arange(len(patterns))
    descending = np.unique(-np.sort(-whole, axis=1), axis=0)
    return _constant(descending), patterns[-LAST_SHELL:], _constant(index)


def _digits(patterns: Float32[Tensor, "n 8"]) -> Int64[Tensor, " n"]:
    powers = 3 ** torch.arange(DIMENSION, device=patterns.device)
    return ((patterns - 0.5).long() * powers).sum(dim=1)


def _encode(
    vectors: Float32[Tensor, "n 8"],
    descending: Float32[Tensor, "7 8"],
    last_shell: Float32[Tensor, "29 8"],
    index: UInt8[Tensor, " digits"],
) -> UInt8[Tensor, "n 2"]:
    moved = torch.cat([vectors - QUARTER, vectors + QUARTER])  # the points to add 1/4 to, and to take it off from
    sizes, negative = moved.abs(), moved < 0
    ordered, order = sizes.sort(dim=1, descending=True)
    odd = negative.sum(dim=1, keepdim=True) % 2
    by_permutation = _gain(ordered, descending, odd, ordered[:, -1:] / 2)  # its pattern's size is 1/2
    least, changed = (sizes[:, None] * last_shell).min(dim=2)
    one_by_one = _gain(sizes, last_shell, odd, least)
    gain, best = torch.cat([by_permutation, one_by_one], dim=1).max(dim=1)
    taken_off = _chosen(gain, moved)
    row = torch.arange(len(vectors), device=vectors.device) + len(vectors) * taken_off
    best, negative, odd = best[row], negative[row], odd[row, 0]
    permuted = best < len(descending)
    beyond = (best - len(descending)).clamp_min(0)
    pattern = torch.zeros_like(vectors).scatter_(1, order[row], descending[best.clamp_max(len(descending) - 1)])
    pattern = torch.where(permuted[:, None], pattern, last_shell[beyond])
    change = torch.where(permuted, order[row, -1], changed[row, beyond])
    wrong = (pattern.sum(dim=1).int() + odd) % 2 == 1
    at = change[:, None]
    negative = negative.scatter(1, at, negative.gather(1, at) ^ wrong[:, None])
    return _bytes(index[_digits(pattern)], negative, taken_off)


def _gain(
    sizes: Float32[Tensor, "n 8"],
    patterns: Float32[Tensor, "patterns 8"],
    odd: Int64[Tensor, "n 1"],
    least: Float32[Tensor, "n ..."],
) -> Float32[Tensor, "n patterns"]:
    """|vector|^2 less the squared distance from each pattern, with the best signs of its parity."""
    wrong = (patterns.sum(dim=1).int() + odd) % 2
    return 2 * (sizes @ patterns.T) - patterns.square().sum(dim=1) - 4 * wrong * least


def _chosen(gain: Float32[Tensor, " both"], moved: Float32[Tensor, "both 8"]) -> Int64[Tensor, " n"]:
    """0 where the nearer point has 1/4 added, 1 where it is taken off."""
    added, taken_off = (moved.square().sum(dim=1) - gain).chunk(2)
    return (taken_off < added).long()


def _bytes(
    pattern: UInt8[Tensor, " n"], negative: Bool[Tensor, "n 8"], taken_off: Int64[Tensor, " n"]
) -> UInt8[Tensor, "n 2"]:
    flags = torch.cat([negative[:, :7], taken_off[:, None] == 1], dim=1)
    return torch.stack([pattern, (flags << torch.arange(DIMENSION, device=pattern.device)).sum(1).to(torch.uint8)], 1)


@functools.cache
def fine_points() -> Float32[Tensor, "256 8"]:
    """256 points of E8 around zero, 1 bit a weight: zero, the 240 shortest, and 15 of the 16 on the axes."""
    half = np.array(list(itertools.product((-0.5, 0.5), repeat=DIMENSION)))
    whole = np.array([v for v in itertools.product((-1.0, 0.0, 1.0), repeat=DIMENSION) if sum(map(abs, v)) == 2])
    axes = 2 * np.concatenate([np.eye(DIMENSION), -np.eye(DIMENSION)])[:15]
    points = np.concatenate([np.zeros((1, DIMENSION)), half[half.sum(axis=1) % 2 == 0], whole, axes])
    return _constant(points.astype(np.float32))


def fine_encode(vectors: Float32[Tensor, "n 8"], points: Float32[Tensor, "256 8"]) -> UInt8[Tensor, " n"]:
    """Index of the point nearest to each vector."""
    halves = points.square().sum(dim=1) / 2
    codes = [(part @ points.T - halves).argmax(dim=1) for part in vectors.split(CHUNK)]
    return torch.cat(codes).to(torch.uint8) if codes else torch.empty(0, dtype=torch.uint8, device=vectors.device)
