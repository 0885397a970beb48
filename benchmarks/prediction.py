"""How well the cost table predicts: expected error of a plan, the achieved one, and the measured divergence.

    python -m benchmarks.prediction [--budgets 2.5 3 ...]

Runs the default recipe on the demo model; what benchmarks/quality.py made at the same budgets is found in the registry.
"""

import argparse

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.quality import BUDGETS, Bench
from pipeline.decompose import matrix_file, read_error, read_matrix
from pipeline.evaluate import evaluate


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="bits per parameter")
    budgets = parser.parse_args().budgets
    bench = Bench("demo", "cpu")
    print("| bits | expected | achieved | measured KL | achieved / expected by matrix, 5, 50, 95% | Spearman |")
    print("| --: | --: | --: | --: | --: | --: |")
    for budget in budgets:
        run = bench.run_of("default", budget)
        statistics = run.statistics()
        plan = run.plan(run.costs(statistics), statistics)
        made, chosen = run.matrices(plan, statistics), run.results.plan(plan)
        files = {module: bench.registry.path(made, matrix_file(module)) for module in chosen.matrices}
        expected = np.array([matrix.cost for matrix in chosen.matrices.values()])
        achieved = np.array([read_error(files[module]) for module in chosen.matrices])
        dense: dict[str, torch.Tensor] = {}
        for matrix in bench.model.matrices:
            dense[matrix.name] = read_matrix(files[matrix.module], chosen, matrix.module).dequantize()
        bench.put(dense)
        measured = evaluate(bench.network, bench.original, bench.tokens).kl_divergence
        low, middle, high = np.percentile(achieved / expected, [5, 50, 95])
        print(
            f"| {budget} | {expected.sum():.4f} | {achieved.sum():.4f} | {measured.text()} | "
            f"{low:.2f}, {middle:.2f}, {high:.2f} | {spearmanr(expected, achieved).statistic:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
