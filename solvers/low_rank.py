"""The best rank-r approximation of a matrix, plain or under row and column weights.

    plain      min || A - L1 L2 ||_F                          truncated SVD (Eckart-Young)
    two-sided  min || D_row (A - L1 L2) D_col ||_F            SVD of D_row A D_col, scales divided out again
               (LQ-LoRA, arXiv:2311.12023, section 3.2: the Fisher-weighted problem with F ~ d_row^2 d_col^2)
    whitened   min tr(H_O (E - L1 L2) H_I (E - L1 L2)^T)      SVD of A^T E B, where H_O = A A^T, H_I = B B^T
               (QERA, arXiv:2410.06040, is H_O = 1; both sides: the Kronecker metric of YAQA, arXiv:2505.22988)

The SVD is randomized (Halko, Martinsson, Tropp 2011, algorithm 4.4): a rank of 8 to 64 out of thousands
takes milliseconds. The sketch has a seeded generator of its own: same input, same factors.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from solvers.whitening import Factor, check_factor, unwhiten, whiten

OVERSAMPLING = 10
POWER_ITERATIONS = 4  # rounding residuals have nearly flat spectra: 2 would miss an eighth of what rank 32 can hold


@dataclass(frozen=True)
class Factors:
    """A ~ out @ into, the singular values split evenly between both."""

    out: Float32[Tensor, "out rank"]
    into: Float32[Tensor, "rank in"]

    def product(self) -> Float32[Tensor, "out in"]:
        """L1 L2."""
        return self.out @ self.into

    def balanced(self) -> "Factors":
        """The same product with orthogonal components of equal norm on both sides, the largest first."""
        basis_out, core_out = torch.linalg.qr(self.out)
        basis_in, core_in = torch.linalg.qr(self.into.T)
        left, values, right = torch.linalg.svd(core_out @ core_in.T)
        root = values.sqrt()
        return Factors(basis_out @ (left * root), root[:, None] * (right @ basis_in.T))


def truncated_svd(matrix: Float32[Tensor, "out in"], rank: int, *, seed: int = 0) -> Factors:
    """The best approximation of rank `rank` in the Frobenius norm.

    Raises:
        ValueError: `rank` is below 1 or above min(out, in).
    """
    smallest = min(matrix.shape)
    if not 1 <= rank <= smallest:
        raise ValueError(f"rank {rank} for a matrix of shape {tuple(matrix.shape)}; it must be 1 to {smallest}")
    width = rank + OVERSAMPLING
    if 3 * width >= smallest:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        sketch = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
        basis = torch.linalg.qr(matrix @ sketch).Q
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(matrix.T @ basis).Q
            basis = torch.linalg.qr(matrix @ basis).Q
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ left
    root = values[:rank].sqrt()
    return Factors(left[:, :rank] * root, root[:, None] * right[:rank])


def whitened_svd(
    residual: Float32[Tensor, "out in"], row_factor: Factor, column_factor: Factor, rank: int, *, seed: int = 0
) -> Factors:
    """The rank-`rank` X that minimises tr(H_O (E - X) H_I (E - X)^T) for the residual E.

    || A^T (E - X) B ||_F^2 is that trace and A, B are invertible, so X = A^-T SVD_r(A^T E B) B^-1, as exactly as
    `truncated_svd` finds it: a randomized rank 8 of a nearly flat spectrum may miss 3% of what can be captured.

    Args:
        row_factor: A with H_O = A A^T, see solvers/whitening.py for its forms.
        column_factor: B with H_I = B B^T, likewise.
    Raises:
        ValueError: a factor has the wrong shape, is not lower triangular or not positive on its diagonal; or
            `rank` is below 1 or above min(out, in).
    """
    factors = truncated_svd(whiten_both(residual, row_factor, column_factor), rank, seed=seed)
    return Factors(unwhiten(factors.out, row_factor), unwhiten(factors.into.T, column_factor).T)


def whitened_spectrum(
    residual: Float32[Tensor, "out in"], row_factor: Factor, column_factor: Factor
) -> Float32[Tensor, " smallest"]:
    """All min(out, in) singular values of A^T E B, the largest first: what every rank can capture, at once.

    Raises:
        ValueError: as `whitened_svd`.
    """
    return torch.linalg.svdvals(whiten_both(residual, row_factor, column_factor))


def errors_by_rank(spectrum: Float32[Tensor, " smallest"]) -> Float64[Tensor, " ranks"]:
    """The least weighted error of rank 0, 1, ..., min(out, in): the squares of the values that are left over.

    Entry r is tr(H_O (E - X) H_I (E - X)^T) of `whitened_svd(..., rank=r)`; the last is 0.
    """
    squares = spectrum.double().square()
    left_over = squares.flip(0).cumsum(0).flip(0)  # summed from the small end: no cancellation
    return torch.cat([left_over, left_over.new_zeros(1)])


def whiten_both(
    residual: Float32[Tensor, "out in"], row_factor: Factor, column_factor: Factor
) -> Float32[Tensor, "out in"]:
    """A^T E B.

    Raises:
        ValueError: see `whitened_svd`.
    """
    check_factor(row_factor, residual.shape[0], "row")
    check_factor(column_factor, residual.shape[1], "column")
    return whiten(whiten(residual, row_factor).T, column_factor).T
