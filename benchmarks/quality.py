"""What each part is worth: quality of the demo model at equal stored bits. Prints a block for BENCHMARKS.md.

    python -m benchmarks.quality [--budgets 2.5 3 3.5 4 4.5]

Rows, each adding one thing, all bits counted, same calibration and evaluation windows:

    uniform NF                 absmax NormalFloat, the largest single choice that fits
    uniform NF + rank 8        the same with a low-rank part (LoftQ-like), the largest that fits
    ILP, no Fisher             NormalFloat choices, rank 8, integer program over unweighted errors (LQ-LoRA, data-free)
    ILP + Fisher               the same weighted with the Fisher diagonal: LQ-LoRA as published
    ours                       the default recipe: Lloyd-Max levels, searched scales, rank as a choice
    bitsandbytes NF4           as installed: double-quantized NF4, at its own size (`pip install bitsandbytes`)
"""

import argparse
from collections.abc import Callable
from datetime import date

import numpy as np
import torch

from benchmarks.demo import demo_run
from pipeline.base_logits import BaseLogits, base_log_probs, cache_key
from pipeline.costs import CostTable, cost_table, measure_matrix
from pipeline.display import Bars
from pipeline.evaluate import evaluate
from pipeline.home import home
from pipeline.model import Matrix
from pipeline.parallel import map_in_order
from pipeline.run import Run
from pipeline.statistics import Statistics
from quantizers import AbstractQuantizer, LowRankPlus, NormalFloat, quantizer_from_label
from solvers import AllocationProblem, solve

RANK = 8
NF = {f"nf{b}-g{g}": NormalFloat(b, g, scale="absmax") for b in (2, 3, 4, 8) for g in (16, 32, 64)}
NF_LOW_RANK: dict[str, AbstractQuantizer] = {name: LowRankPlus(quantizer, RANK) for name, quantizer in NF.items()}


class Bench:
    """The model in memory, the original's predictions, and one way to measure anything."""

    def __init__(self, run: Run, statistics: Statistics) -> None:
        self.run, self.statistics = run, statistics
        self.matrices = run.model.matrices
        self.weights = {matrix.name: run.model.weight(matrix) for matrix in self.matrices}
        tokens = run.eval_windows.tokens
        self.original: BaseLogits = base_log_probs(
            run.model.load,
            tokens,
            cache_dir=home() / "logits",
            key=cache_key(run.model.digest, tokens, torch.float32),
            progress=Bars(),
        )
        self.network = run.model.load()

    def row(self, name: str, chosen: dict[str, AbstractQuantizer], statistics: Statistics | None) -> None:
        """Quantize every matrix as chosen, evaluate, print."""

        def dense(matrix: Matrix) -> tuple[Matrix, torch.Tensor, int]:
            learnt = statistics.of(matrix) if statistics else None
            quantized = chosen[matrix.name].quantize(self.weights[matrix.name], learnt)
            return matrix, quantized.dequantize(), quantized.size_bits

        size_bits = 0
        for matrix, weight, bits in map_in_order(dense, self.matrices):
            self.put(matrix, weight)
            size_bits += bits
        self.print_row(name, size_bits)

    def put(self, matrix: Matrix, weight: torch.Tensor) -> None:
        """Replace one weight of the model in memory."""
        self.network.get_submodule(matrix.module).weight.data.copy_(weight)

    def print_row(self, name: str, size_bits: float) -> None:
        """Evaluate the model as it is now."""
        report = evaluate(self.network, self.original, self.run.eval_windows.tokens)
        bits = size_bits / self.run.model.num_matrix_params
        print(
            f"| {name} | {bits:.3f} | {report.perplexity.text()} | {report.kl_divergence.text()} | "
            f"{100 * report.top1_agreement.mean:.1f} |",
            flush=True,
        )

    def table(self, choices: dict[str, AbstractQuantizer], statistics: Statistics | None) -> CostTable:
        """The cheap cost table over `choices`."""

        def measure(matrix: Matrix) -> dict[str, float]:
            learnt = statistics.of(matrix) if statistics else None
            rows = self.run.recipe.cost_rows
            return measure_matrix(self.weights[matrix.name], learnt, choices, num_rows=rows, seed=0)

        bars = Bars().track(map_in_order(measure, self.matrices), "Cost table", total=len(self.matrices))
        found = dict(zip((matrix.name for matrix in self.matrices), bars, strict=True))
        labels = {name: quantizer.format.label for name, quantizer in choices.items()}
        by_label = {labels[name]: name for name in choices}
        offered = {matrix.name: list(by_label) for matrix in self.matrices}
        return cost_table(self.matrices, offered, cost=lambda name, label: found[name][by_label[label]])

    def allocated(
        self, table: CostTable, budget: float, quantizer_of: Callable[[str], AbstractQuantizer]
    ) -> dict[str, AbstractQuantizer]:
        """Matrix -> quantizer that the integer program chooses."""
        problem = AllocationProblem(table.cost, table.size_bits, int(budget * table.num_params.sum()))
        choice = solve(problem).choice
        return {name: quantizer_of(table.choices[c]) for name, c in zip(table.matrices, choice, strict=True)}

    def uniform(self, choices: dict[str, AbstractQuantizer], budget: float) -> dict[str, AbstractQuantizer] | None:
        """The largest single choice that fits everywhere together."""
        sizes = {name: sum(q.size_bits(m.shape) for m in self.matrices) for name, q in choices.items()}
        fitting = {name: size for name, size in sizes.items() if size <= budget * self.run.model.num_matrix_params}
        if not fitting:
            return None
        best = choices[max(fitting, key=lambda name: fitting[name])]
        return {matrix.name: best for matrix in self.matrices}


def bitsandbytes_row(bench: Bench) -> None:
    """bitsandbytes' own NF4 with nested scales, dequantized by itself."""
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError as error:
        print(f"| bitsandbytes NF4 | not installed: {error} | | | |")
        return
    size_bits = 0
    for matrix in bench.matrices:
        weight = bench.weights[matrix.name]
        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        bench.put(matrix, dequantize_4bit(packed, state).view(weight.shape))
        stored = (packed, state.absmax, state.state2.absmax)
        size_bits += sum(8 * tensor.numel() * tensor.element_size() for tensor in stored) + 32
    bench.print_row("bitsandbytes NF4, double quant", size_bits)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3.0, 3.5, 4.0, 4.5])
    budgets = parser.parse_args().budgets
    run, statistics = demo_run()
    bench = Bench(run, statistics)
    recipe = run.recipe
    lq = {q.format.label: q for q in NF_LOW_RANK.values()}
    tables = {
        "unweighted": bench.table(NF_LOW_RANK, None),
        "fisher": bench.table(NF_LOW_RANK, statistics),
        "ours": bench.table({label: quantizer_from_label(label) for label in run.labels}, statistics),
    }
    print(f"\n### What each part is worth, {date.today()}\n")
    print(
        f"SmolLM2-135M-Instruct (`demo`), {recipe.num_samples} x {recipe.seq_len} calibration tokens, "
        f"{len(run.eval_windows)} x {recipe.eval_seq_len} evaluation tokens (WikiText-2 raw test); original perplexity "
        f"{original_perplexity(bench)}. Bits per parameter count codes, scales and factors.\n"
    )
    print("| method | bits | perplexity | KL, nats/token | top-1 % |\n| --- | --: | --: | --: | --: |")
    for budget in budgets:
        print(f"| **budget {budget}** | | | | |")
        for name, choices in (("uniform NF", NF), (f"uniform NF + rank {RANK}", NF_LOW_RANK)):
            chosen = bench.uniform(choices, budget)
            if chosen is None:
                print(f"| {name} | nothing fits | | | |")
            else:
                bench.row(name, chosen, None)
        for name, key, weighted in (
            ("ILP, no Fisher", "unweighted", None),
            ("ILP + Fisher", "fisher", statistics),
        ):
            try:
                bench.row(name, bench.allocated(tables[key], budget, lq.__getitem__), weighted)
            except ValueError as error:
                print(f"| {name} | {error} | | | |")
        bench.row("ours", bench.allocated(tables["ours"], budget, quantizer_from_label), statistics)
    bitsandbytes_row(bench)


def original_perplexity(bench: Bench) -> str:
    """Of the model as it was opened."""
    report = evaluate(bench.network, bench.original, bench.run.eval_windows.tokens)
    assert np.isclose(report.kl_divergence.mean, 0, atol=1e-4)
    return report.base_perplexity.text()


if __name__ == "__main__":
    main()
