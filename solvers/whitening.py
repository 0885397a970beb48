"""Multiplying by the factor of a weighting matrix, and undoing it.

A weighting matrix H = A A^T of the rows of a residual E turns the weighted norm into a plain one,

    tr(H E E^T) = || A^T E ||_F^2

so a problem weighted with H is the plain problem for A^T E. A is given as what it is:

    [n, n]   lower triangular, positive diagonal: torch.linalg.cholesky(H), damped by the caller
    [n]      positive: diag(A), for a diagonal H
    None     the identity

Columns are weighted by whitening the transpose.
"""

import torch
from jaxtyping import Float32
from torch import Tensor

Factor = Float32[Tensor, "_ _"] | Float32[Tensor, " _"] | None


def whiten(matrix: Float32[Tensor, "n m"], factor: Factor) -> Float32[Tensor, "n m"]:
    """A^T M."""
    if factor is None:
        return matrix
    return factor[:, None] * matrix if factor.ndim == 1 else factor.T @ matrix


def unwhiten(matrix: Float32[Tensor, "n m"], factor: Factor) -> Float32[Tensor, "n m"]:
    """A^-T M: undoes `whiten`."""
    if factor is None:
        return matrix
    if factor.ndim == 1:
        return matrix / factor[:, None]
    return torch.linalg.solve_triangular(factor.T, matrix, upper=True)


def check_factor(factor: Factor, size: int, axis: str) -> None:
    """Refuse what would whiten wrongly without a sound.

    Args:
        size: rows of the matrix to be whitened.
        axis: what they are, for the message: "row" or "column".
    Raises:
        ValueError: wrong shape, not lower triangular, or a diagonal that is not positive.
    """
    if factor is None:
        return
    if factor.ndim not in (1, 2) or set(factor.shape) != {size}:
        raise ValueError(
            f"The {axis} factor has shape {tuple(factor.shape)}; the residual's {axis}s ask for ({size}, {size}), "
            f"({size},) for a diagonal, or None."
        )
    if factor.ndim == 2 and bool(factor.triu(1).any()):
        raise ValueError(
            f"The {axis} factor is not lower triangular. Give torch.linalg.cholesky(H) of the damped weighting "
            "matrix H, not H itself or a symmetric root."
        )
    diagonal = factor if factor.ndim == 1 else factor.diagonal()
    if not bool((diagonal > 0).all()):
        raise ValueError(
            f"The {axis} factor has a diagonal entry that is not positive ({float(diagonal.min())}); it cannot be "
            "divided by. Add damping to the weighting matrix before factorising it."
        )


def diagonal_weights(factor: Factor) -> Float32[Tensor, " _"] | None:
    """The diagonal of H = A A^T: what each row weighs when the others are looked away from."""
    if factor is None:
        return None
    return factor.square() if factor.ndim == 1 else factor.square().sum(dim=1)
