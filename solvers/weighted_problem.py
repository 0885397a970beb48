"""min sum F * (M - X)^2 over X of rank k, for any non-negative weights F: the problem, without a method.

Scaling rows and columns of X keeps its rank, so the problem may be solved in the variable D_r X D_c with weights
F / (d_r^2 d_c^2). With d_r^2, d_c^2 the row and column means of F the scaled weights lie near 1, and the
methods, whose steps shrink with mean F / max F, need far fewer of them (Tuzhilina and Hastie, arXiv:2109.11057,
ask for weights in [0, 1]; the scaling is ours).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from solvers.low_rank import Factors

LEAST_SCALE = 1e-3  # of the mean scale: rows and columns without any weight must not be divided by zero


@dataclass(frozen=True)
class Problem:
    """`target` M and `weights` F with maximum 1."""

    target: Float32[Tensor, "out in"]
    weights: Float32[Tensor, "out in"]

    def loss(self, factors: Factors) -> float:
        """sum F * (M - L1 L2)^2, added up in float64."""
        return float((self.weights * (self.target - factors.product()).square()).sum(dtype=torch.float64))

    def filled_in(self, factors: Factors) -> Float32[Tensor, "out in"]:
        """F * M + (1 - F) * X: the target where it counts, the approximation where it does not."""
        product = factors.product()
        return product + self.weights * (self.target - product)


@dataclass(frozen=True)
class Iterate:
    """One iteration's factors and their loss in the problem at hand."""

    factors: Factors
    loss: float


Method = Callable[[Problem, Factors], Iterator[Iterate]]


@dataclass(frozen=True)
class Scaling:
    """X' = D_r X D_c, F' = F / (d_r^2 d_c^2) / `unit`: the scaled problem and the way back."""

    rows: Float32[Tensor, " out"]
    columns: Float32[Tensor, " in"]
    unit: float

    @staticmethod
    def of(weights: Float32[Tensor, "out in"]) -> "Scaling":
        """From the row and column means of F; `unit` makes the largest scaled weight 1."""
        rows, columns = _scales(weights.mean(dim=1)), _scales(weights.mean(dim=0))
        return Scaling(rows, columns, float((weights / rows.square()[:, None] / columns.square()).max()))

    def problem(self, target: Float32[Tensor, "out in"], weights: Float32[Tensor, "out in"]) -> Problem:
        """The problem in the scaled variable; its losses are 1 / `unit` of the original ones."""
        scaled = weights / self.rows.square()[:, None] / self.columns.square() / self.unit
        return Problem(self.rows[:, None] * target * self.columns, scaled)

    def enter(self, factors: Factors) -> Factors:
        """Factors of X -> factors of X'."""
        return Factors(self.rows[:, None] * factors.out, factors.into * self.columns)

    def leave(self, factors: Factors) -> Factors:
        """Factors of X' -> factors of X."""
        return Factors(factors.out / self.rows[:, None], factors.into / self.columns)


def _scales(means: Tensor) -> Tensor:
    root = means.sqrt()
    return root.clamp_min(LEAST_SCALE * float(root.mean()))
