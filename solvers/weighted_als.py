"""Weighted low-rank approximation by alternating least squares: exact steps, no step size, loss never rises.

With L2 fixed the rows of L1 separate, each a least-squares problem of `rank` unknowns with its own weights,

    (L2 diag(F_i) L2^T + ridge) delta = L2 diag(F_i) (M_i - a_i L2)      a_i <- a_i + delta

and the same for the columns of L2 with L1 fixed. The fixed factor is made orthonormal first, so that with weights
near 1 the normal equations are near the identity. The small ridge pulls to the previous a_i instead of to zero: it
does not move the fixed points, and a row with fewer weights than unknowns keeps what its weights do not decide.
A sweep takes O(out * in * rank^2) operations.

(Alternating weighted regression: Gabriel and Zamir 1979; Srebro and Jaakkola 2003.)
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float32
from torch import Tensor

from solvers.low_rank import Factors
from solvers.weighted_problem import Iterate, Problem

RIDGE = 1e-5  # of the mean diagonal of the normal equations: above float32 noise, far below what slows the steps
CHUNK = 2**24  # numbers of normal equations held at a time


def als(problem: Problem, start: Factors) -> Iterator[Iterate]:
    """One sweep, first over the rows of L1 and then over the columns of L2, an iterate."""
    factors = start
    while True:
        factors = _refit_out(problem.target, problem.weights, factors)
        mirrored = _refit_out(problem.target.T, problem.weights.T, Factors(factors.into.T, factors.out.T))
        factors = Factors(mirrored.into.T, mirrored.out.T)
        yield Iterate(factors, problem.loss(factors))


def _refit_out(target: Tensor, weights: Tensor, factors: Factors) -> Factors:
    basis, triangle = torch.linalg.qr(factors.into.T)
    out = factors.out @ triangle.T
    into = basis.T.contiguous()
    rank = into.shape[0]
    row, column = torch.tril_indices(rank, rank, device=into.device)
    pairs = (into[row] * into[column]).T  # [in, pairs]: every product of two basis vectors
    gradient = (weights * (target - out @ into)) @ basis
    steps = [
        _solve(w @ pairs, g, row, column)
        for w, g in zip(*(tensor.split(max(1, CHUNK // rank**2)) for tensor in (weights, gradient)), strict=True)
    ]
    return Factors(out + torch.cat(steps), into)


def _solve(
    entries: Float32[Tensor, "rows pairs"], gradient: Float32[Tensor, "rows rank"], row: Tensor, column: Tensor
) -> Float32[Tensor, "rows rank"]:
    rank = gradient.shape[1]
    normal = entries.new_zeros(len(entries), rank, rank)
    normal[:, row, column] = entries
    normal[:, column, row] = entries
    diagonal = normal.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(dim=1, keepdim=True)
    diagonal += torch.where(mean > 0, RIDGE * mean, 1.0)
    return torch.cholesky_solve(gradient[:, :, None], torch.linalg.cholesky(normal))[:, :, 0]
