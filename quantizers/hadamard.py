"""A random rotation of any dimension from a seed: signs, then a Walsh-Hadamard and a small orthogonal transform.

Rotated weights look normal and their outliers are spread over the row (incoherence processing, QuIP#, Tseng et al.
2024, arXiv:2402.04396, section 3). For n = 2**a * p with p odd, R = diag(signs) (H kron P): H the Walsh-Hadamard matrix
of order 2**a, P the Hartley matrix of order p (Bracewell 1983), cos + sin of 2 pi j k / p over
sqrt(p). Both are symmetric and their own inverses; no entry of R exceeds sqrt(2 / n).
"""

import functools
import math

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor


def signs(n: int, seed: int) -> Float32[Tensor, " n"]:
    """n signs, -1 or 1, the same for a seed on every machine and with every version of torch.

    Only the seed is stored, so the signs are no generator's: sign i is the highest bit of output i of SplitMix64
    (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") started at `seed`.

    Args:
        seed: 0 to 2**64 - 1.
    Raises:
        ValueError: n is not positive, or the seed is out of range.
    """
    if n < 1:
        raise ValueError(f"a rotation has a positive dimension, not {n}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"the seed of a rotation is 0 to 2**64 - 1, not {seed}")
    state = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    highest_bit = (state ^ (state >> np.uint64(31))) >> np.uint64(63)
    return torch.from_numpy(1 - 2 * highest_bit.astype(np.float32))


def rotate(x: Float[Tensor, "*batch n"], seed: int) -> Float[Tensor, "*batch n"]:
    """x R along the last dimension, R orthogonal and set by `seed` and n alone.

    Takes O(n (log n + p)) operations a row, p the odd part of n; differentiable.

    Args:
        x: float32 or float64.
    Raises:
        ValueError: another dtype, an empty last dimension, or the seed is out of range.
    """
    _check(x)
    return _transform(x * signs(x.shape[-1], seed).to(x))


def unrotate(y: Float[Tensor, "*batch n"], seed: int) -> Float[Tensor, "*batch n"]:
    """y R^T, the inverse of `rotate` with the same seed; takes and raises the same."""
    _check(y)
    return _transform(y) * signs(y.shape[-1], seed).to(y)


def _check(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a rotation takes float32 or float64, not {x.dtype}; convert the tensor first")


def _transform(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """x (H kron P): a Kronecker product acts factor by factor, on the dimension that the factor's order splits off."""
    y, rest = x, x.shape[-1]
    for factor in _factors(x.shape[-1]):
        order = len(factor)
        rest //= order
        y = factor.to(x) @ y.reshape(-1, order, rest) if rest > 1 else y.reshape(-1, order) @ factor.to(x)
    return y.reshape(x.shape)


@functools.lru_cache(maxsize=8)
def _factors(n: int) -> list[Float64[Tensor, "order order"]]:
    """Symmetric orthogonal matrices whose Kronecker product is H kron P; H in butterflies of at most 2**6 inputs."""
    doublings = (n & -n).bit_length() - 1
    # Not under a caller's inference mode or default device: the matrices outlive the call.
    with torch.inference_mode(False), torch.device("cpu"):
        factors = [_walsh_hadamard(min(6, doublings - i)) for i in range(0, doublings, 6)]
        return [*factors, _hartley(n >> doublings)] if n >> doublings > 1 or not factors else factors


def _walsh_hadamard(doublings: int) -> Float64[Tensor, "order order"]:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(doublings):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2)
    return matrix


def _hartley(p: int) -> Float64[Tensor, "p p"]:
    k = torch.arange(p)
    angle = (k[:, None] * k % p).double() * (2 * math.pi / p)  # reduced in integers, so large p stays exact
    return (angle.cos() + angle.sin()) / math.sqrt(p)
