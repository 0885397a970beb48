"""How much of a low-rank correction do few bits a factor keep? Prints two blocks for BENCHMARKS.md.

    python -m benchmarks.factor_bits --work FOLDER [--layers 0 15 29] [--rank 16]

A share of 1 is the weighted error that the best factors take away, unrounded; "rounded" rounds those, "refitted" lets
the factors make up for each other's rounding; bits are per number, scales included.

simulated   normal weights 384 x 384 rounded to 2 bits with error feedback under an input second moment with
            eigenvalues i^-alpha in a random basis; the correction is fitted to the residual, under the same moment
demo model  residuals of 3-bit Lloyd-Max, weighted with Fisher rows and either Fisher columns or the input's second
            moment; least over the matrices in brackets
"""

import argparse
from collections import defaultdict
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.fisher_halves import fisher_halves
from quantizers import LloydMax
from quantizers.codebooks import lloyd_max
from quantizers.factor_refit import refit_factors
from quantizers.factors import FACTOR_BITS, FactorFormat
from quantizers.scale_search import nearest
from solvers.low_rank import errors_by_rank, whitened_spectrum, whitened_svd
from solvers.whitening import Factor

ALPHAS = (1.0, 1.5, 2.0)
SIZE = 384
DAMPING = 0.01  # of the mean diagonal
WINDOWS = 8


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps the statistics between calls")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 15, 29])
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    print(f"\n### Bits a factor: share of the gain kept, simulated, rank 8, {date.today()}\n")
    problems: dict[str, list[tuple[Tensor, Factor, Factor]]] = {}
    for alpha in ALPHAS:
        problems[f"alpha {alpha}"] = [simulated(alpha, seed) for seed in range(3)]
    table(problems, 8)
    print(f"\n### The same on the demo model, layers {arguments.layers}, rank {arguments.rank}, {date.today()}\n")
    problems = defaultdict(list)
    for half in fisher_halves(tuple(arguments.layers), WINDOWS, arguments.work):
        residual = half.weight - LloydMax(3).quantize(half.weight, half.first).dequantize()
        moment = half.first.input_second_moment
        assert moment is not None
        rows = half.first.row_scale
        problems["Fisher rows and columns"].append((residual, rows, half.first.column_scale))
        problems["Fisher rows, input moment"].append((residual, rows, _damped_factor(moment)))
    table(problems, arguments.rank)


def table(problems: dict[str, list[tuple[Tensor, Factor, Factor]]], rank: int) -> None:
    """Print a row for each width; a problem is (residual, row factor, column factor)."""
    print("| bits | " + " | ".join(f"{name}, rounded | refitted" for name in problems) + " |")
    print("| --: |" + " --: |" * (2 * len(problems)))
    for bits in FACTOR_BITS:
        cells, form = [], FactorFormat(bits)
        for group in problems.values():
            kept = torch.tensor([_kept(*problem, rank, form) for problem in group])
            cells += [f"{mean:.3f} ({least:.3f})" for mean, least in zip(kept.mean(0), kept.amin(0), strict=True)]
        sizes = [form.size_bits(tuple(r.shape), rank) / sum(r.shape) / rank for g in problems.values() for r, _, _ in g]
        print(f"| {sum(sizes) / len(sizes):.2f} | " + " | ".join(cells) + " |")


def simulated(alpha: float, seed: int) -> tuple[Tensor, Factor, Factor]:
    """The residual of 2-bit rounding with error feedback, and the weighting it is judged by."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
    column_factor = _damped_factor((basis * (torch.arange(SIZE) + 1.0) ** -alpha) @ basis.T)
    weight = torch.randn(SIZE, SIZE, generator=generator)
    return weight - _with_feedback(weight, column_factor), None, column_factor


def _with_feedback(weight: Tensor, column_factor: Tensor) -> Tensor:
    """Columns from last to first, each taking over what the factor says of the errors behind it.

    || E B ||^2 for a lower triangular B is the sum over columns j of (e_j B_jj + sum_{i > j} e_i B_ij)^2.
    """
    levels = lloyd_max(2)
    unit = levels * float(weight.std()) / float(levels.abs().max()) * 1.51  # the outer level of a normal's 2 bits
    rounded = torch.zeros_like(weight)
    for j in reversed(range(weight.shape[1])):
        behind = (weight[:, j + 1 :] - rounded[:, j + 1 :]) @ column_factor[j + 1 :, j] / column_factor[j, j]
        rounded[:, j] = unit[nearest(weight[:, j] + behind, unit).long()]
    return rounded


def _damped_factor(moment: Tensor) -> Tensor:
    damping = DAMPING * float(moment.diagonal().mean())
    return torch.linalg.cholesky(moment + damping * torch.eye(len(moment)))


def _kept(
    residual: Tensor, row_factor: Factor, column_factor: Factor, rank: int, form: FactorFormat
) -> tuple[float, float]:
    errors = errors_by_rank(whitened_spectrum(residual, row_factor, column_factor))
    start = whitened_svd(residual, row_factor, column_factor, rank)
    fit = refit_factors(residual, form, rank, row_factor=row_factor, column_factor=column_factor, init=start)
    gain = float(errors[0] - errors[rank])
    return (float(errors[0]) - fit.errors[0]) / gain, (float(errors[0]) - fit.error) / gain


if __name__ == "__main__":
    main()
