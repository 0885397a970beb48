"""Weighted low-rank approximation by repeated truncated SVDs of the filled-in matrix (arXiv:2109.11057).

    Y = F * M + (1 - F) * X        target where the weights are 1, the current X where they are 0
    X <- SVD_k(Y)                  a majorize-minimize step of size one: the loss never rises

The plain iteration is `em`. `nesterov` fills in with an extrapolated X and starts its momentum anew when the loss
rises (the restart is from O'Donoghue and Candes 2015). `anderson` replaces Y by that combination of its last
values whose fixed-point residuals cancel best, guarded: a combination that raises the loss is dropped with the history.
Every iterate is one truncated SVD, also one that is then dropped, so traces of the three compare by cost.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float32
from torch import Tensor

from solvers.low_rank import Factors, truncated_svd
from solvers.weighted_problem import Iterate, Problem

ANDERSON_DEPTH = 5
ANDERSON_RIDGE = 1e-8  # of the trace of the residuals' Gram matrix, which is nearly singular close to the end


def em(problem: Problem, start: Factors) -> Iterator[Iterate]:
    """The plain iteration, one step an iterate."""
    filled_in = problem.filled_in(start)
    while True:
        iterate = _truncate(problem, filled_in, start)
        yield iterate
        filled_in = problem.filled_in(iterate.factors)


def nesterov(problem: Problem, start: Factors) -> Iterator[Iterate]:
    """Extrapolated steps; the best X is kept as the base, and a step from it without momentum is a plain one."""
    best = Iterate(start, problem.loss(start))
    filled_in, since_restart = problem.filled_in(start), 1
    while True:
        iterate = _truncate(problem, filled_in, start)
        yield iterate
        if iterate.loss > best.loss:
            filled_in, since_restart = problem.filled_in(best.factors), 1
            continue
        momentum = (since_restart - 1) / (since_restart + 2)
        # X + momentum (X - previous X), written as factors of twice the rank
        extrapolated = Factors(
            torch.cat([(1 + momentum) * iterate.factors.out, -momentum * best.factors.out], dim=1),
            torch.cat([iterate.factors.into, best.factors.into]),
        )
        filled_in = problem.filled_in(extrapolated)
        best, since_restart = iterate, since_restart + 1


def anderson(problem: Problem, start: Factors) -> Iterator[Iterate]:
    """Anderson mixing of the filled-in matrices, depth `ANDERSON_DEPTH`: as many matrices [out, in] are kept twice."""
    plain = filled_in = problem.filled_in(start)
    least = problem.loss(start)
    images: list[Tensor] = []
    residuals: list[Tensor] = []
    while True:
        iterate = _truncate(problem, filled_in, start)
        yield iterate
        if iterate.loss > least:
            images, residuals, filled_in = [], [], plain
            continue
        least = iterate.loss
        plain = problem.filled_in(iterate.factors)
        images = [*images, plain][-ANDERSON_DEPTH:]
        residuals = [*residuals, plain - filled_in][-ANDERSON_DEPTH:]
        filled_in = _mix(images, residuals)


def _truncate(problem: Problem, filled_in: Tensor, start: Factors) -> Iterate:
    factors = truncated_svd(filled_in, start.out.shape[1])
    return Iterate(factors, problem.loss(factors))


def _mix(images: list[Tensor], residuals: list[Tensor]) -> Float32[Tensor, "out in"]:
    """sum alpha_i image_i with sum alpha_i = 1 and the shortest sum alpha_i residual_i."""
    flat = torch.stack([residual.reshape(-1) for residual in residuals])
    gram = (flat @ flat.T).double()
    ridge = ANDERSON_RIDGE * gram.trace().clamp_min(torch.finfo(torch.float64).tiny)
    shares = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), torch.ones(len(gram)).to(gram))
    shares = (shares / shares.sum()).tolist()
    return torch.stack([share * image for share, image in zip(shares, images, strict=True)]).sum(dim=0)
