"""min sum F * (M - L1 L2)^2 for elementwise weights F, where no closed form exists: the front door.

    als        alternating least squares: the one to use; a sweep or two from the closed form is most of the gain
    em         majorization by truncated SVDs, the plain and slow one
    nesterov   the same with momentum and restarts
    anderson   the same with Anderson mixing, guarded

All of them start from the closed form for row and column means of F (LQ-LoRA, arXiv:2311.12023, section 3.2), so
the answer is never worse than it. They find a local optimum: the problem is NP-hard (Gillis and Glineur 2011).

Never worse under the given F, that is. An F measured on few windows is fitted with its noise; see
benchmarks/weighted_low_rank.py for what is left of the gain on other windows.
"""

from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float32
from torch import Tensor

from solvers.low_rank import Factors, whitened_svd
from solvers.weighted_als import als
from solvers.weighted_majorization import anderson, em, nesterov
from solvers.weighted_problem import Iterate, Method, Scaling

METHODS: dict[str, Method] = {"als": als, "em": em, "nesterov": nesterov, "anderson": anderson}
EXACT = 1e-12  # of the loss of X = 0: float32 holds no better fit
PATIENCE = 2  # a step that gains nothing may be one that an acceleration took back


@dataclass(frozen=True)
class WeightedFit:
    """The best factors that were met, and the way there.

    Attributes:
        factors: L1 and L2, balanced.
        losses: sum F * (M - L1 L2)^2 of the start and then of every iterate.
        converged: `PATIENCE` iterates in a row gained less than the tolerance.
    """

    factors: Factors
    losses: tuple[float, ...]
    converged: bool

    @property
    def loss(self) -> float:
        """The least of the losses, the one of `factors`."""
        return min(self.losses)


def weighted_low_rank(
    residual: Float32[Tensor, "out in"],
    weights: Float32[Tensor, "out in"],
    rank: int,
    *,
    method: str = "als",
    init: Factors | None = None,
    max_iterations: int = 100,
    tolerance: float = 1e-5,
) -> WeightedFit:
    """Factors of rank `rank` that minimise the weighted squared error to `residual`.

    Args:
        weights: non-negative and finite, not all zero; any unit.
        method: key of METHODS.
        init: where to start, of rank `rank`; None for the closed form under row and column means of `weights`.
        max_iterations: sweeps (als) or truncated SVDs (the others).
        tolerance: of the loss; `PATIENCE` iterates in a row that gain less end the iteration.
    Raises:
        ValueError: an argument is not as described, or `rank` is below 1 or above min(out, in).
    """
    _check(residual, weights, rank, method, init, max_iterations)
    unit = float(weights.max())
    weights = weights / unit  # so that no square is lost, whatever the unit
    scaling = Scaling.of(weights)
    problem = scaling.problem(residual, weights)
    start = scaling.enter(init or whitened_svd(residual, scaling.rows, scaling.columns, rank))
    best = Iterate(start, problem.loss(start))
    losses, idle, converged = [best.loss], 0, False
    negligible = EXACT * float((problem.weights * problem.target.square()).sum(dtype=torch.float64))
    for iterate in islice(METHODS[method](problem, start), max_iterations):
        losses.append(iterate.loss)
        idle = idle + 1 if best.loss - iterate.loss <= tolerance * best.loss else 0
        if iterate.loss < best.loss:
            best = iterate
        converged = idle == PATIENCE or best.loss <= negligible
        if converged:
            break
    return WeightedFit(
        scaling.leave(best.factors).balanced(), tuple(unit * scaling.unit * loss for loss in losses), converged
    )


def _check(
    residual: Tensor, weights: Tensor, rank: int, method: str, init: Factors | None, max_iterations: int
) -> None:
    if weights.shape != residual.shape:
        raise ValueError(
            f"The weights have shape {tuple(weights.shape)} and the residual {tuple(residual.shape)}; "
            "give one weight for each of its entries."
        )
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()) or not bool(weights.any()):
        raise ValueError(
            "The weights must be finite, at least 0, and not all 0. Check the statistics they come from, or take "
            "truncated_svd for an unweighted fit."
        )
    smallest = min(residual.shape)
    if not 1 <= rank <= smallest:
        raise ValueError(f"rank {rank} for a matrix of shape {tuple(residual.shape)}; it must be 1 to {smallest}")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    shapes = (residual.shape[0], rank), (rank, residual.shape[1])
    if init is not None and (init.out.shape, init.into.shape) != shapes:
        raise ValueError(
            f"init has factors of shapes {tuple(init.out.shape)} and {tuple(init.into.shape)}; "
            f"rank {rank} asks for {shapes[0]} and {shapes[1]}"
        )
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}; it must be at least 1")
