"""Weighting factors in every form that the whitened solvers take, and their error written down plainly."""

import torch
from torch import Tensor

FORMS = ["none", "diagonal", "full"]


def factor(size: int, form: str, seed: int) -> Tensor | None:
    """A random factor A of H = A A^T; "full" is the Cholesky factor of a well-conditioned H."""
    generator = torch.Generator().manual_seed(seed)
    if form == "none":
        return None
    if form == "diagonal":
        return torch.rand(size, generator=generator) + 0.2
    sample = torch.randn(3 * size, size, generator=generator) * (torch.arange(size) + 1.0) ** -0.5
    return torch.linalg.cholesky(sample.T @ sample / len(sample) + 0.01 * torch.eye(size))


def as_matrix(factor: Tensor | None, size: int) -> Tensor:
    """H in float64."""
    if factor is None:
        return torch.eye(size, dtype=torch.float64)
    dense = factor.double().diag() if factor.ndim == 1 else factor.double()
    return dense @ dense.T


def whitened_error(error: Tensor, row_factor: Tensor | None, column_factor: Tensor | None) -> float:
    """tr(H_O E H_I E^T)."""
    rows, columns = (as_matrix(f, size) for f, size in zip((row_factor, column_factor), error.shape, strict=True))
    return float(torch.trace(rows @ error.double() @ columns @ error.double().T))
