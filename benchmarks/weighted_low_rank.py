"""When does an elementwise-weighted low-rank fit beat the closed forms? Prints two blocks for BENCHMARKS.md.

    python -m benchmarks.weighted_low_rank --work FOLDER [--windows 8] [--layers 0 15 29] [--rank 16]

Everywhere the weighted error that a rank-`--rank` correction leaves, as a share of the error without one.

synthetic   normal residuals 256 x 320, independent log-normal weights: the largest gain that there can be, since
            nothing about such weights can be told from their row and column means
demo model  residuals of 3-bit Lloyd-Max; the Fisher diagonal of one half of the windows is fitted (and was given to
            the quantizer), that of the other half judges: "seen / held out". "shrunk" fits the mean of the Fisher
            diagonal and its rank-one approximation by row and column means.
"""

import argparse
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.fisher_halves import SEQ_LEN, Halves, fisher_halves
from quantizers import LloydMax
from solvers.low_rank import Factors, truncated_svd, whitened_svd
from solvers.weighted_low_rank import weighted_low_rank

Fit = Callable[[Tensor, Tensor, int], Factors]
SPREADS = (0.5, 1.0, 2.0)  # standard deviation of the weights' logarithm
SEEDS = range(3)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps the statistics between calls")
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of each half")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 15, 29])
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    synthetic(arguments.rank)
    real(fisher_halves(tuple(arguments.layers), arguments.windows, arguments.work), arguments)


def synthetic(rank: int) -> None:
    """Print the table of log-normal weights."""
    print(f"\n### Elementwise-weighted low rank, log-normal weights, {date.today()}\n")
    print("| method, rank " + f"{rank} | " + " | ".join(f"log-std {s}" for s in SPREADS) + " | seconds |")
    print("| --- |" + " --: |" * (len(SPREADS) + 1))
    for name, fit in METHODS.items():
        started = time.process_time()
        cells = [sum(_synthetic_share(fit, rank, spread, seed) for seed in SEEDS) / len(SEEDS) for spread in SPREADS]
        seconds = (time.process_time() - started) / len(SEEDS) / len(SPREADS)
        print(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + f" | {seconds:.2f} |")


def real(halves: list[Halves], arguments: argparse.Namespace) -> None:
    """Print the table of the demo model: a row a method, a column a kind of matrix, mean over layers."""
    kinds = list(dict.fromkeys(half.matrix.kind for half in halves))
    spread = sum(_spread(half.first.fisher_diag) for half in halves) / len(halves)
    print(f"\n### The same on Fisher diagonals of the demo model, held out, {date.today()}\n")
    print(
        f"Layers {arguments.layers}, {arguments.windows} + {arguments.windows} windows of {SEQ_LEN} tokens, rank "
        f"{arguments.rank}, 3-bit residuals; seen / held out. The logarithm of the Fisher diagonal has standard "
        f"deviation {spread:.2f} around row plus column means.\n"
    )
    print("| method | " + " | ".join(kinds) + " |")
    print("| --- |" + " --: |" * len(kinds))
    residuals = [half.weight - LloydMax(3).quantize(half.weight, half.first).dequantize() for half in halves]
    for name, fit in REAL_METHODS.items():
        shares = {kind: [] for kind in kinds}
        for half, residual in zip(halves, residuals, strict=True):
            remaining = residual - fit(residual, half.first.fisher_diag, arguments.rank).product()
            pair = [_share(remaining, residual, which.fisher_diag) for which in (half.first, half.second)]
            shares[half.matrix.kind].append(pair)
        means = [torch.tensor(shares[kind]).mean(dim=0).tolist() for kind in kinds]
        print(f"| {name} | " + " | ".join(f"{seen:.3f} / {held_out:.3f}" for seen, held_out in means) + " |")


def _plain(residual: Tensor, weights: Tensor, rank: int) -> Factors:
    return truncated_svd(residual, rank)


def _closed_form(residual: Tensor, weights: Tensor, rank: int) -> Factors:
    rows, columns = weights.mean(dim=1).sqrt(), weights.mean(dim=0).sqrt()
    floor = 1e-3 * float(weights.mean().sqrt())
    return whitened_svd(residual, rows.clamp_min(floor), columns.clamp_min(floor), rank)


def _iterated(residual: Tensor, weights: Tensor, rank: int, method: str, num_iterations: int) -> Factors:
    return weighted_low_rank(residual, weights, rank, method=method, max_iterations=num_iterations).factors


def _shrunk(residual: Tensor, weights: Tensor, rank: int, num_iterations: int) -> Factors:
    rank_one = weights.mean(dim=1, keepdim=True) * weights.mean(dim=0) / weights.mean()
    return _iterated(residual, (weights + rank_one) / 2, rank, "als", num_iterations)


METHODS: dict[str, Fit] = {
    "truncated SVD, unweighted": _plain,
    "row and column means": _closed_form,
    "als, 1 sweep": partial(_iterated, method="als", num_iterations=1),
    "als, 2 sweeps": partial(_iterated, method="als", num_iterations=2),
    "als, 100 sweeps": partial(_iterated, method="als", num_iterations=100),
    "em, 100 SVDs": partial(_iterated, method="em", num_iterations=100),
    "nesterov, 100 SVDs": partial(_iterated, method="nesterov", num_iterations=100),
    "anderson, 100 SVDs": partial(_iterated, method="anderson", num_iterations=100),
}
REAL_METHODS: dict[str, Fit] = {
    "truncated SVD, unweighted": _plain,
    "row and column means": _closed_form,
    "als, 1 sweep": partial(_iterated, method="als", num_iterations=1),
    "als, 2 sweeps": partial(_iterated, method="als", num_iterations=2),
    "als, 20 sweeps": partial(_iterated, method="als", num_iterations=20),
    "als, 2 sweeps, shrunk": partial(_shrunk, num_iterations=2),
}


def _synthetic_share(fit: Fit, rank: int, spread: float, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randn(256, 320, generator=generator)
    weights = torch.exp(spread * torch.randn(256, 320, generator=generator))
    return _share(residual - fit(residual, weights, rank).product(), residual, weights)


def _share(remaining: Tensor, residual: Tensor, weights: Tensor) -> float:
    return float((weights * remaining.square()).sum() / (weights * residual.square()).sum())


def _spread(weights: Tensor) -> float:
    """What row and column means of the logarithm leave over."""
    log = weights.clamp_min(1e-6 * float(weights.mean())).log()
    return float((log - log.mean(dim=1, keepdim=True) - log.mean(dim=0) + log.mean()).std())


if __name__ == "__main__":
    main()
