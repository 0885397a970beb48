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
from torch.utils._python_dispatch import _disable_current_modes


@functools.lru_cache(maxsize=64)
def signs(n: int, seed: int) -> Float32[Tensor, " n"]:
    """n signs, -1 or 1, the same for a seed on every machine and with every version of torch.

    Kept for the next call: never change them. Only the seed is stored, so the signs are no generator's: sign i is the
    highest bit of output i of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators") started at `seed`.

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
    with torch.inference_mode(False):  # they outlive the call
        return torch.from_numpy(1 - 2 * highest_bit.astype(np.float32))


def rotate(x: Float[Tensor, "*batch n"], seed: int, dim: int = -1) -> Float[Tensor, "*batch n"]:
    """x R along the last dimension, or R^T x along the first; R orthogonal and set by `seed` and n alone.

    Takes O(n (log n + p)) operations a row, p the odd part of n; differentiable.

    Args:
        x: float32 or float64.
        dim: -1 or 0; n is the size there. 0 is for matrices, and spares two transpositions.
    Raises:
        ValueError: another dtype, an empty dimension, or the seed is out of range.
    """
    _check(x)
    return _transform(x * _signs_for(x, seed, dim), dim)


def unrotate(y: Float[Tensor, "*batch n"], seed: int, dim: int = -1) -> Float[Tensor, "*batch n"]:
    """y R^T along the last dimension, or R y along the first: the inverse of `rotate`; takes and raises the same."""
    _check(y)
    return _transform(y, dim) * _signs_for(y, seed, dim)


def _check(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a rotation takes float32 or float64, not {x.dtype}; convert the tensor first")


def _signs_for(x: Tensor, seed: int, dim: int) -> Tensor:
    found = _signs_on(x.shape[dim], seed, x.dtype, x.device)
    return found if dim == -1 else found[:, None]


@functools.cache  # what is thrown out may still be read by another stream
def _signs_on(n: int, seed: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " n"]:
    """Kept on the device: a copy to a GPU for each product would stop it, and a CUDA graph forbids it."""
    with _disable_current_modes(), torch.inference_mode(False):  # else an export's fake tensors would be kept
        return _for_all_streams([signs(n, seed).to(device, dtype)])[0]


def _transform(x: Float[Tensor, "*batch n"], dim: int) -> Float[Tensor, "*batch n"]:
    """x (H kron P), or along dimension 0."""
    if x.numel() == 0:
        return x
    if dim == 0:
        return _transform_columns(x)
    columns = x.reshape(-1, x.shape[-1]).T.contiguous()
    return _transform_columns(columns).T.contiguous().view(x.shape)


def _transform_columns(x: Float[Tensor, "n columns"]) -> Float[Tensor, "n columns"]:
    """(H kron P) x: a Kronecker product acts factor by factor, on the dimension that the factor's order splits off.

    All columns go through a factor together, in products of a small matrix and a wide one.
    """
    y, done = x, 1
    for factor in _factors_on(x.shape[0], x.dtype, x.device):
        y = factor @ y.reshape(done, len(factor), -1)
        done *= len(factor)
    return y.reshape(x.shape)


@functools.cache
def _factors_on(n: int, dtype: torch.dtype, device: torch.device) -> list[Float[Tensor, "order order"]]:
    """Kept on the device, like signs."""
    with _disable_current_modes(), torch.inference_mode(False):
        return _for_all_streams([factor.to(device, dtype) for factor in _factors(n)])


def _for_all_streams(made: list[Tensor]) -> list[Tensor]:
    """The same, once it is there: a GPU's other streams read what is kept without waiting for this one."""
    if made[0].is_cuda and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(made[0].device).synchronize()
    return made


@functools.lru_cache(maxsize=8)
def _factors(n: int) -> list[Float64[Tensor, "order order"]]:
    """Symmetric orthogonal matrices whose Kronecker product is H kron P; H in butterflies of at most 2**5 inputs."""
    doublings = (n & -n).bit_length() - 1
    num_factors = -(-doublings // 5)
    sizes = [doublings // num_factors + (i < doublings % num_factors) for i in range(num_factors)]
    # Not under a caller's inference mode or default device: the matrices outlive the call.
    with torch.inference_mode(False), torch.device("cpu"):
        factors = [_walsh_hadamard(size) for size in sizes]
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
