"""How well the cost table predicts: expected error of a plan, the achieved one, and the measured divergence.

    python -m benchmarks.prediction [--budgets 2.5 3 ...] [--windows 2 [--of-calibration-text]]

Runs the default recipe on the demo model; what benchmarks/quality.py made at the same budgets is found in the registry.
With `--windows` each matrix is also put into the original alone, and the divergence measured on so many windows: of the
evaluation text, or of the calibration text those that nothing was fitted to.
"""

import argparse
import sys

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr

from benchmarks.quality import BUDGETS, Bench
from pipeline.allocation import Plan
from pipeline.calibration import token_windows
from pipeline.decompose import matrix_file, read_error, read_matrix
from pipeline.display import Bars
from pipeline.evaluate import evaluate
from pipeline.model import Matrix
from pipeline.quality import original_logits

MOST_WINDOWS = 512  # about all of the text
FURTHEST = 12  # matrices that are named


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="bits per parameter")
    parser.add_argument("--windows", type=int, default=0, help="for each matrix alone; about 2 s a matrix and window")
    parser.add_argument("--of-calibration-text", action="store_true", help="those windows; else of the evaluation text")
    asked = parser.parse_args()
    bench = Bench("demo", "cpu")
    print("| bits | expected | achieved | measured KL | achieved / expected by matrix, 5, 50, 95% | Spearman |")
    print("| --: | --: | --: | --: | --: | --: |")
    alone = []
    for budget in asked.budgets:
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
        if asked.windows:
            tokens = _unseen(bench) if asked.of_calibration_text else bench.tokens
            alone.append(_by_matrix(bench, f"{budget}", dense, chosen, tokens[: asked.windows]))
    if alone:
        print(
            "\n| bits | measured / expected of a matrix alone, 5, 50, 95% | Spearman | Pearson of the logarithms ",
            end="",
        )
        print("| sum over matrices alone | all together |\n| --: | --: | --: | --: | --: | --: |")
        print("\n".join(alone))


def _unseen(bench: Bench) -> torch.Tensor:
    """Windows of the calibration text that the statistics were not made from."""
    tokenizer, (_, seq_len) = bench.model.tokenizer(), bench.calibration.shape
    ends = bench.model.task.ends(tokenizer)
    text = token_windows(None, tokenizer, num_windows=MOST_WINDOWS, seq_len=seq_len, seed=0, ends=ends).tokens
    seen = {tuple(window) for window in bench.calibration.tolist()}
    return torch.stack([window for window in text if tuple(window.tolist()) not in seen][::-1])


def _by_matrix(bench: Bench, bits: str, dense: dict[str, torch.Tensor], chosen: Plan, tokens: torch.Tensor) -> str:
    """A row: each matrix in the place of its original, and nothing else."""
    original = original_logits(bench.model, tokens, "cpu", Bars())

    def divergence() -> float:
        return evaluate(bench.network, original, tokens).kl_divergence.mean

    def put(matrix: Matrix, weight: torch.Tensor) -> None:
        bench.network.get_parameter(matrix.name).data.copy_(weight.T if matrix.transposed else weight)

    together, measured, expected = divergence(), [], []
    bench.put(bench.weights)
    for matrix in Bars().track(bench.model.matrices, "each alone", len(bench.model.matrices)):
        put(matrix, dense[matrix.name])
        measured.append(divergence())
        put(matrix, bench.weights[matrix.name])
        expected.append(chosen.matrices[matrix.module].cost)
    ratios = np.array(measured) / np.array(expected)
    low, middle, high = np.percentile(ratios, [5, 50, 95])
    furthest = [f"{bench.model.matrices[row].module} {ratios[row]:.2f}" for row in ratios.argsort()[::-1][:FURTHEST]]
    print(f"{bits} bits, furthest above: {', '.join(furthest)}", file=sys.stderr)
    return (
        f"| {bits} | {low:.2f}, {middle:.2f}, {high:.2f} | {spearmanr(expected, measured).statistic:.3f} | "
        f"{pearsonr(np.log(expected), np.log(measured)).statistic:.3f} | {sum(measured):.4f} | {together:.4f} |"
    )


if __name__ == "__main__":
    main()
