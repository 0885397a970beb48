"""Factors of a curvature matrix: triangular ones for rounding with error feedback, and for whitening.

With H_O = V diag(dO) V^T and H_I = U diag(dI) U^T, U and V unit upper triangular,

    tr(H_O E H_I E^T) = sum_ij dO_i dI_j E'_ij^2,   E' = V^T E U

where E'_ij holds E_ij and the errors of rows above and columns to the left only, so that a later weight
can make up for them (GPTQ, arXiv:2210.17323; LDLQ of QuIP, arXiv:2307.13304; two-sided in YAQA, arXiv:2505.22988).

Estimates from a few ten thousand tokens are noisy and may be singular, so some damping goes onto the diagonal, in
units of its mean, and as much more as the factorization takes.
"""

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal, as in GPTQ
MOST_DAMPING = 100.0  # beyond it a matrix counts as one that cannot be factorized


@dataclass(frozen=True)
class Triangular:
    """H = U D U^T.

    Attributes:
        unit_upper: U, ones on its diagonal, zeros below it.
        pivots: the diagonal of D, positive.
        damping: what was added to the diagonal, in units of its mean; infinite where the identity stands in for H.
        inner: R with D = R R^T, where D is block diagonal (`in_blocks`); None where it is diagonal.
    """

    unit_upper: Float32[Tensor, "n n"]
    pivots: Float32[Tensor, " n"]
    damping: float
    inner: Float32[Tensor, "n n"] | None = None

    @staticmethod
    def identity(size: int, device: torch.device, damping: float = 0.0) -> "Triangular":
        """Of no curvature: every weight counts alike and none makes up for another."""
        return Triangular(torch.eye(size, device=device), torch.ones(size, device=device), damping)

    @functools.cached_property
    def inverse_squares(self) -> Float64[Tensor, " n"]:
        """Squared norms of the rows of U^-1: what an error in the triangular basis comes to in the weight's own."""
        identity = torch.eye(len(self.pivots), device=self.unit_upper.device)
        inverse = torch.linalg.solve_triangular(self.unit_upper, identity, upper=True, unitriangular=True)
        return inverse.square().sum(dim=1, dtype=torch.float64)

    def in_blocks(self, size: int) -> "Triangular":
        """The same product with U the identity within blocks of `size`, for blocks that are rounded at one go."""
        upper, root = self.unit_upper.clone(), torch.zeros_like(self.unit_upper)
        for start in range(0, len(root), size):
            block = slice(start, start + size)
            own = self.unit_upper[block, block]
            root[block, block] = own * self.pivots[block].sqrt()
            upper[:start, block] = torch.linalg.solve_triangular(own, upper[:start, block], upper=True, left=False)
            upper[block, block] = torch.eye(len(own), device=upper.device)
        return Triangular(upper, root.square().sum(dim=1), self.damping, root)

    def weigh(self, errors: Float32[Tensor, "m n"]) -> Float32[Tensor, "m n"]:
        """`errors` E' of the triangular basis, times R: their squares' sum is what the loss sees of them."""
        return errors * self.pivots.sqrt() if self.inner is None else errors @ self.inner


def factorize(curvature: Float[Tensor, "n n"]) -> Triangular:
    """Factorize a symmetric positive semidefinite matrix with as much damping as it takes.

    A matrix without any curvature (all zeros, or not finite) gives the identity, and its `damping` tells so.
    """
    # The factor of the reversed matrix, reversed again, is upper triangular.
    found = _cholesky(curvature.flip(0, 1))
    if found is None:
        return Triangular.identity(len(curvature), curvature.device, float("inf"))
    lower, damping = found
    upper = lower.flip(0, 1)
    scale = upper.diagonal()
    return Triangular((upper / scale).float(), scale.square().float(), damping)


def lower_factor(curvature: Float[Tensor, "n n"]) -> Float32[Tensor, "n n"]:
    """A lower triangular with H = A A^T, damped like `factorize`'s; the identity for a matrix without any curvature."""
    found = _cholesky(curvature)
    return torch.eye(len(curvature), device=curvature.device) if found is None else found[0].float()


def _cholesky(curvature: Tensor) -> tuple[Float64[Tensor, "n n"], float] | None:
    """The lower Cholesky factor in float64 and the damping that it took, tenfold more after each failure."""
    wide = curvature.double()
    mean = float(wide.diagonal().mean())
    if not 0 < mean < float("inf") or not torch.isfinite(wide).all():
        return None
    damping = DAMPING
    while damping <= MOST_DAMPING:
        damped = wide / mean
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # a side of a large matrix takes gigabytes
        if not failed:
            return lower.mul_(mean**0.5), damping
        damping *= 10
    return None
