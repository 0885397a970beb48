"""Matrices that read the same input share the right factor of their low-rank parts.

Stacked on the output side, [E_q; E_k; E_v] ~ [L1_q; L1_k; L1_v] L2: a rank costs in + sum of outs numbers instead of
count * in + sum of outs. Weighted with one H_O = A A^T a matrix (block-diagonal over the stack) and one H_I = B B^T
for the shared input, the truncated SVD of the whitened stack is the exact optimum.

(Joint rank-k approximation: Peng et al. 2024, arXiv:2402.16319, there unweighted and of the weights themselves.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from solvers.low_rank import Factors, truncated_svd, whiten_both
from solvers.whitening import Factor, unwhiten


@dataclass(frozen=True)
class JointFactors:
    """E_i ~ outs[i] @ into, [out_i, rank] each and [rank, in] shared; evenly split in the whitened space."""

    outs: tuple[Float32[Tensor, "_ rank"], ...]
    into: Float32[Tensor, "rank in"]

    def of(self, index: int) -> Factors:
        """The factors of one of the matrices."""
        return Factors(self.outs[index], self.into)

    @property
    def num_numbers(self) -> int:
        """Numbers to store, `into` once."""
        return self.into.numel() + sum(out.numel() for out in self.outs)


def joint_whitened_svd(
    residuals: Sequence[Float32[Tensor, "_ in"]],
    row_factors: Sequence[Factor],
    column_factor: Factor,
    rank: int,
    *,
    seed: int = 0,
) -> JointFactors:
    """The best factors of rank `rank` with a common right one, for sum_i tr(H_O,i E_i H_I E_i^T).

    Args:
        residuals: one matrix [out_i, in] each.
        row_factors: A_i of each, in the forms of solvers/whitening.py.
        column_factor: B of the input that all of them read.
    Raises:
        ValueError: no matrix, widths differ, not one row factor a matrix, a factor is refused by
            `whitened_svd`, or `rank` is below 1 or above min(sum of outs, in).
    """
    stack = _whitened_stack(residuals, row_factors, column_factor)
    factors = truncated_svd(stack, rank, seed=seed)
    outs = factors.out.split([residual.shape[0] for residual in residuals])
    return JointFactors(
        tuple(unwhiten(out, factor) for out, factor in zip(outs, row_factors, strict=True)),
        unwhiten(factors.into.T, column_factor).T,
    )


def joint_whitened_spectrum(
    residuals: Sequence[Float32[Tensor, "_ in"]], row_factors: Sequence[Factor], column_factor: Factor
) -> Float32[Tensor, " smallest"]:
    """All singular values of the whitened stack; `errors_by_rank` makes the joint error of every rank of it.

    Raises:
        ValueError: as `joint_whitened_svd`.
    """
    return torch.linalg.svdvals(_whitened_stack(residuals, row_factors, column_factor))


def _whitened_stack(residuals: Sequence[Tensor], row_factors: Sequence[Factor], column_factor: Factor) -> Tensor:
    widths = {residual.shape[1] for residual in residuals}
    if len(widths) != 1:
        raise ValueError(
            f"Matrices of widths {sorted(widths)} cannot share a right factor; give one or more matrices that read "
            "the same input."
        )
    if len(row_factors) != len(residuals):
        raise ValueError(
            f"{len(residuals)} matrices came with {len(row_factors)} row factors; give one each, None for no weighting."
        )
    pairs = zip(residuals, row_factors, strict=True)
    return torch.cat([whiten_both(residual, factor, column_factor) for residual, factor in pairs])
