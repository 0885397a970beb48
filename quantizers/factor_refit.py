"""Low-rank factors that make up for each other's rounding (the LPLR step of CALDERA, arXiv:2405.18886, section 3).

    minimise tr(H_O (E - L1 L2) H_I (E - L1 L2)^T)   over L1, L2 that can be stored

by turns, from the rounded best unrounded factors: with the rounded L1 fixed the best L2 solves a least-squares
problem and is rounded; with that L2 fixed the best L1 is solved for and rounded. Rounding may undo a step's gain, so
the best pair is kept. H_I drops out of the first equation and H_O out of the second.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from quantizers.factors import FactorFormat, dequantize_factors, quantize_into, quantize_out
from solvers.low_rank import Factors, whiten_both, whitened_svd
from solvers.whitening import Factor, diagonal_weights, whiten

ROUNDS = 2  # two more win another 0.1% of the gain at 4 bits, 0.4% at 3


@dataclass(frozen=True)
class StoredFactors:
    """Factors as stored.

    Attributes:
        tensors: as in `FactorFormat.tensor_specs`.
        errors: the weighted error of the rounded start and after every half-round; `error` is the least.
    """

    tensors: dict[str, Tensor]
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        """tr(H_O (E - L1 L2) H_I (E - L1 L2)^T) of `tensors`."""
        return min(self.errors)


def refit_factors(
    residual: Float32[Tensor, "out in"],
    form: FactorFormat,
    rank: int,
    *,
    row_factor: Factor = None,
    column_factor: Factor = None,
    init: Factors | None = None,
    rounds: int = ROUNDS,
) -> StoredFactors:
    """The factors of `residual`, fitted as they will be stored.

    Args:
        row_factor: A with H_O = A A^T, in the forms of solvers/whitening.py.
        column_factor: B with H_I = B B^T, likewise.
        init: unrounded factors of rank `rank` to start from; None for `whitened_svd`.
        rounds: of both half-steps; 0 rounds the start only.
    Raises:
        ValueError: see `whitened_svd` and `quantize_factors`; `rounds` is below 0.
    """
    if rounds < 0:
        raise ValueError(f"rounds is {rounds}; it must be at least 0")
    shape = (residual.shape[0], residual.shape[1])
    row_weights, column_weights = diagonal_weights(row_factor), diagonal_weights(column_factor)
    half_whitened_rows = whiten(residual, row_factor)  # A^T E
    half_whitened_columns = whiten(residual.T, column_factor)  # B^T E^T

    def error(tensors: dict[str, Tensor]) -> float:
        remaining = residual - dequantize_factors(tensors, form, shape, rank).product()
        return float(whiten_both(remaining, row_factor, column_factor).square().sum(dtype=torch.float64))

    start = init or whitened_svd(residual, row_factor, column_factor, rank)
    tensors = quantize_out(start.out, form, row_weights) | quantize_into(start.into, form, column_weights)
    best, errors = tensors, [error(tensors)]
    for half_step in range(2 * rounds):
        factors = dequantize_factors(tensors, form, shape, rank)
        if half_step % 2 == 0:
            into = _least_squares(whiten(factors.out, row_factor), half_whitened_rows)
            tensors = tensors | quantize_into(into, form, column_weights)
        else:
            out = _least_squares(whiten(factors.into.T, column_factor), half_whitened_columns).T
            tensors = tensors | quantize_out(out, form, row_weights)
        errors.append(error(tensors))
        if errors[-1] <= min(errors):
            best = tensors
    return StoredFactors(best, tuple(errors))


def _least_squares(basis: Float32[Tensor, "n rank"], target: Float32[Tensor, "n m"]) -> Float32[Tensor, "rank m"]:
    """The X that minimises || target - basis X ||_F, the shortest one where columns of `basis` depend on each other."""
    gram = (basis.T @ basis).double()
    return (torch.linalg.pinv(gram, hermitian=True) @ (basis.T @ target).double()).float()
