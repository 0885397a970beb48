"""How far is the cheap cost table from the exhaustive one? Prints a block for BENCHMARKS.md.

    python -m benchmarks.cost_table [--every 5]

The exhaustive table decomposes every matrix anew for every choice. It is made for every `--every`-th layer of the
demo model (all of them would take hours), with the statistics and choices of the default recipe. Compared are the
order of the costs (Spearman, within a matrix and over all), and what following the cheap table costs: the true
cost of its plan over the true cost of the exhaustive table's plan, at several budgets.
"""

import argparse
import time
from datetime import date

import numpy as np
from rich.progress import track
from scipy.stats import spearmanr

from benchmarks.demo import demo_run
from pipeline.costs import cost_table, measure_matrix
from pipeline.parallel import map_in_order
from quantizers import quantizer_from_label, weighted_error
from solvers import AllocationProblem, solve

BUDGETS = (2.5, 3.0, 3.5, 4.0, 4.5)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=5, help="take every n-th layer")
    every = parser.parse_args().every
    run, statistics = demo_run()
    matrices = tuple(matrix for matrix in run.model.matrices if matrix.layer % every == 0)
    choices = {label: quantizer_from_label(label) for label in run.labels}

    def cheap(matrix):
        return measure_matrix(
            run.model.weight(matrix), statistics.of(matrix), choices, num_rows=run.recipe.cost_rows, seed=0
        )

    def exhaustive(matrix):
        weight, learnt = run.model.weight(matrix), statistics.of(matrix)
        return {
            label: weighted_error(weight - quantizer.quantize(weight, learnt).dequantize(), learnt)
            for label, quantizer in choices.items()
        }

    tables, seconds = {}, {}
    for name, measure in (("cheap", cheap), ("exhaustive", exhaustive)):
        started = time.monotonic()
        rows = list(track(map_in_order(measure, matrices), name, total=len(matrices)))
        seconds[name] = time.monotonic() - started
        found = dict(zip((matrix.name for matrix in matrices), rows, strict=True))
        offered = {matrix.name: run.labels for matrix in matrices}
        tables[name] = cost_table(matrices, offered, cost=lambda matrix, label, found=found: found[matrix][label])
    within = [spearmanr(a, b).statistic for a, b in zip(tables["cheap"].cost, tables["exhaustive"].cost, strict=True)]
    ratio = tables["cheap"].cost / tables["exhaustive"].cost
    print(f"\n### Cheap cost table against the exhaustive one, {date.today()}\n")
    print(
        f"Demo model, layers 0, {every}, {2 * every} ...: {len(matrices)} matrices x {len(choices)} choices, "
        f"{run.recipe.cost_rows} rows a matrix, {run.recipe.num_samples} x {run.recipe.seq_len} calibration tokens.\n"
    )
    print(f"- seconds: {seconds['cheap']:.1f} cheap, {seconds['exhaustive']:.1f} exhaustive, ratio "
          f"{seconds['exhaustive'] / seconds['cheap']:.0f}; scaled to all {len(run.model.matrices)} matrices: "
          f"{seconds['cheap'] * every:.0f} and {seconds['exhaustive'] * every:.0f}")  # fmt: skip
    print(f"- Spearman of the costs within a matrix: mean {np.mean(within):.4f}, least {np.min(within):.4f}; over all "
          f"entries {spearmanr(tables['cheap'].cost, tables['exhaustive'].cost, axis=None).statistic:.5f}")  # fmt: skip
    print(f"- cheap / exhaustive: median {np.median(ratio):.3f}, 5th to 95th percentile "
          f"{np.quantile(ratio, 0.05):.3f} to {np.quantile(ratio, 0.95):.3f}\n")  # fmt: skip
    print("| budget, bits per parameter | " + " | ".join(map(str, BUDGETS)) + " |")
    print("| --- " + "| --: " * len(BUDGETS) + "|")
    excess = []
    for budget in BUDGETS:
        true = tables["exhaustive"]
        bits = int(budget * true.num_params.sum())
        cost = {
            name: true.cost[np.arange(len(matrices)), solve(AllocationProblem(t.cost, t.size_bits, bits)).choice].sum()
            for name, t in tables.items()
        }
        excess.append(f"{cost['cheap'] / cost['exhaustive'] - 1:+.2%}")
    print("| true cost of the cheap table's plan over the exhaustive one's | " + " | ".join(excess) + " |")


if __name__ == "__main__":
    main()
