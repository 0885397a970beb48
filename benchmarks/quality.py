"""Quality at equal stored bits: ours by preset, the published recipe, and other quantizers as installed.

    python -m benchmarks.quality [--model demo] [--budgets 2.25 2.5 ...] [--recipes default] [--peers] [--dither]
        [--uniform lloyd3-g32-s4 ...] [--device cuda]

Prints one Markdown table. All rows have the same evaluation windows, count every stored bit, and see the same 64 x 512
tokens of calibration text; only recovery trains on more of that text. What was made before, with the same settings and
code, is taken from the registry; seconds are then those of the making, kept beside it.

    ours, PRESET     `compress` as a user runs it: statistics, cost table, plan, matrices, recovery
    LQ-LoRA          the published recipe with our parts: absmax NormalFloat, integer program over Fisher-weighted
                     errors, rank 8 in 16 bits for every matrix, no recovery
    uniform          one quantizer for all matrices, by its label
    others           see benchmarks/peers: each in a process of its own, dequantized by itself
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from datetime import date
from functools import partial
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.dither import dithered_copy
from benchmarks.peers.float32_copy import float32_copy
from benchmarks.peers.job import is_projection
from benchmarks.peers.result import load_weights
from benchmarks.peers.rows import ROWS
from benchmarks.peers.run import run as run_peers
from pipeline.base_logits import BaseLogits, base_log_probs, cache_key
from pipeline.costs import CostTable, cost_table, measure_matrix
from pipeline.decompose import matrix_file, read_matrix
from pipeline.display import Bars
from pipeline.evaluate import evaluate
from pipeline.home import home
from pipeline.model import Matrix, open_model
from pipeline.parallel import map_in_order
from pipeline.recipe import PRESETS, Recipe
from pipeline.recovered import KEPT_FILE, read_kept
from pipeline.run import Run
from pipeline.stages import StageLog, forget_peak, peak_memory_bytes
from pipeline.statistics import Statistics
from quantizers import AbstractQuantizer, LayerStatistics, LowRankPlus, NormalFloat, quantizer_from_label
from registry import Artifact, Registry
from solvers import AllocationProblem, InfeasibleBudgetError, solve

BUDGETS = (2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 4.25)
NUM_SAMPLES = 64
RANK = 8
PUBLISHED_RECIPE = "published"
PUBLISHED = [LowRankPlus(NormalFloat(b, g, scale="absmax"), RANK) for b in (2, 3, 4, 8) for g in (16, 32, 64)]


class Bench:
    """The original in memory, its predictions, and one way to measure anything."""

    def __init__(self, model: str, device: str) -> None:
        self.registry = Registry(home() / "registry")
        self.spec, self.device = model, device
        run = self.run_of("default", 3.0)
        self.model, texts = run.model, run.texts
        assert texts.calibration is not None
        assert texts.evaluation is not None
        self.tokens, self.calibration = texts.evaluation.tokens, texts.calibration.tokens
        self.network = self.model.load(device=device)
        names = {matrix.name for matrix in self.model.matrices}
        rest = ((name, each) for name, each in self.network.named_parameters() if name not in names and each.ndim == 1)
        self.others = {name: each.detach().clone() for name, each in rest}  # what recovery may train
        self.weights = {matrix.name: self.model.weight(matrix) for matrix in self.model.matrices}
        self.original: BaseLogits = base_log_probs(
            lambda: self.model.load(device=device),
            self.tokens,
            cache_dir=home() / "logits",
            key=cache_key(self.model.digest, self.tokens, torch.float32),
            progress=Bars(),
        )

    def run_of(self, preset: str, budget: float, **settings: object) -> Run:
        """A prepared run."""
        recipe = Recipe.of(
            preset,
            model=self.spec,
            budget=f"{budget}bpw",
            num_samples=NUM_SAMPLES,
            eval_windows=24,
            **settings,
        )
        return Run.prepare(recipe, self.registry, device=self.device, resume=True, log=StageLog(), progress=Bars())

    def put(self, weights: dict[str, Tensor], kept: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Give the model in memory these weights [out, in] and trained parameters; the others are the original's."""
        self.network.load_state_dict(dict(self.others) | dict(kept), strict=False)
        for matrix in self.model.matrices:
            weight = weights[matrix.name]
            parameter = self.network.get_parameter(matrix.name)
            parameter.data.copy_(weight.T if matrix.transposed else weight)

    def row(self, name: str, size_bits: float, seconds: float | None, peak_bytes: float | None) -> None:
        """Evaluate the model as it is now, and print."""
        report = evaluate(self.network, self.original, self.tokens)
        spent = "" if seconds is None else f"{seconds:.0f}"
        peak = "" if peak_bytes is None else f"{peak_bytes / 1e9:.1f}"
        print(
            f"| {name} | {size_bits / self.model.num_matrix_params:.3f} | {report.perplexity.text()} | "
            f"{report.kl_divergence.text()} | {100 * report.top1_agreement.mean:.1f} | {spent} | {peak} |",
            flush=True,
        )


class Seconds:
    """Seconds and peak bytes of each artifact's making, kept beside the registry for later calls."""

    def __init__(self) -> None:
        self.path = home() / "benchmark-seconds.json"
        self.known: dict[str, list[float]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def of(self, make: Callable[[], Artifact | None], log: StageLog) -> tuple[Artifact | None, float, float]:
        """Make the artifact, or find it made."""
        with log.stage("made"):
            artifact = make()
        stage = log.stages[-1]
        if artifact is None:
            return None, 0.0, 0.0
        if not stage.reused:
            self.known[artifact.digest] = [stage.seconds, stage.peak_memory_bytes]
            self.path.write_text(json.dumps(self.known))
        seconds, peak_bytes = self.known.get(artifact.digest, [float("nan"), float("nan")])
        return artifact, seconds, peak_bytes


def ours(bench: Bench, seconds: Seconds, name: str, preset: str, budget: float, **settings: object) -> None:
    """What `compress --preset PRESET` makes of the budget, with other settings where some are given."""
    run = bench.run_of(preset, budget, **settings)
    statistics, *first = seconds.of(run.statistics, run.log)
    costs, *second = seconds.of(lambda: run.costs(statistics), run.log)
    assert costs is not None
    with run.log.stage("plan"):  # the rival's decomposition and measurement, where there is one
        plan = run.plan(costs, statistics)
    planned = [run.log.stages[-1].seconds, run.log.stages[-1].peak_memory_bytes]
    matrices, *third = seconds.of(lambda: run.matrices(plan, statistics), run.log)
    assert matrices is not None
    spent = [first, second, planned, third]
    if run.recipe.recover:
        matrices, *fourth = seconds.of(lambda: run.recovered(plan, matrices, statistics), run.log)
        assert matrices is not None
        spent.append(fourth)
    chosen, file = run.results.plan(plan), partial(bench.registry.path, matrices)
    weights = {m.name: read_matrix(file(matrix_file(m.module)), chosen, m.module) for m in bench.model.matrices}
    kept = read_kept(file(KEPT_FILE)) if KEPT_FILE in matrices.files else {}
    bench.put({name: weight.dequantize() for name, weight in weights.items()}, kept)
    bench.row(name, chosen.size_bits, sum(s for s, _ in spent), max(peak for _, peak in spent))


def quantized(
    bench: Bench,
    name: str,
    chosen: Callable[[Matrix], AbstractQuantizer],
    learnt: Callable[[Matrix], LayerStatistics | None],
    *,
    before: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Quantize every matrix as chosen, under what was learnt about it; evaluate, print.

    Args:
        before: seconds and peak bytes of what led to the choice.
    """
    forget_peak()
    started = time.monotonic()

    def dense(matrix: Matrix) -> tuple[Matrix, Tensor, int]:
        result = chosen(matrix).quantize(bench.weights[matrix.name], learnt(matrix))
        return matrix, result.dequantize(), result.size_bits

    size_bits, weights = 0, {}
    for matrix, weight, bits in map_in_order(dense, bench.model.matrices):
        weights[matrix.name] = weight
        size_bits += bits
    seconds = time.monotonic() - started + before[0]
    peak_bytes = max(peak_memory_bytes(), before[1])
    bench.put(weights)
    bench.row(name, size_bits, seconds, peak_bytes)


class Published:
    """LQ-LoRA's recipe, its cost table measured once."""

    def __init__(self, bench: Bench, seconds: Seconds) -> None:
        self.bench = bench
        run = bench.run_of("default", 3.0, sensitivity="fisher")
        artifact, *of_statistics = seconds.of(run.statistics, run.log)
        assert artifact is not None
        self.statistics = Statistics.open(lambda name: bench.registry.path(artifact, name))
        self.by_label = {quantizer.format.label: quantizer for quantizer in PUBLISHED}
        with run.log.stage("costs"):
            self.table = self._table(run.recipe.cost_rows)
        table = run.log.stages[-1]
        self.before = of_statistics[0] + table.seconds, max(of_statistics[1], table.peak_memory_bytes)

    def row(self, budget: float) -> None:
        """The plan for a budget, quantized and evaluated."""
        problem = AllocationProblem(self.table.cost, self.table.size_bits, int(budget * self.table.num_params.sum()))
        try:
            choice = solve(problem).choice
        except InfeasibleBudgetError:
            print(f"| LQ-LoRA, published recipe | nothing fits {budget} | | | | | |", flush=True)
            return
        chosen = {name: self.table.choices[c] for name, c in zip(self.table.matrices, choice, strict=True)}
        name = "LQ-LoRA, published recipe"
        by_matrix = {matrix: self.by_label[label] for matrix, label in chosen.items()}
        quantized(self.bench, name, lambda matrix: by_matrix[matrix.name], self.statistics.of, before=self.before)

    def _table(self, num_rows: int) -> CostTable:
        matrices = self.bench.model.matrices

        def measure(matrix: Matrix) -> dict[str, float]:
            weight, learnt = self.bench.weights[matrix.name], self.statistics.of(matrix)
            return measure_matrix(weight, learnt, self.by_label, num_rows=num_rows, seed=0)

        bars = Bars().track(map_in_order(measure, matrices), "Cost table", total=len(matrices))
        found = dict(zip((matrix.name for matrix in matrices), bars, strict=True))
        offered = {matrix.name: list(self.by_label) for matrix in matrices}
        return cost_table(matrices, offered, cost=lambda name, label: found[name][label])


def uniform(bench: Bench, labels: list[str]) -> None:
    """One quantizer for all matrices, under the default's statistics."""
    artifact = bench.run_of("default", 3.0).statistics()
    assert artifact is not None
    learnt = Statistics.open(lambda name: bench.registry.path(artifact, name)).of
    for label in labels:
        quantizer = quantizer_from_label(label)
        quantized(bench, label, lambda matrix, quantizer=quantizer: quantizer, learnt)


def others(bench: Bench, only: list[str]) -> None:
    """The peers, each as installed."""
    folder = home() / "peers" / bench.model.digest[:12]
    folder.mkdir(parents=True, exist_ok=True)
    tokens = folder / "tokens.safetensors"
    save_file({"tokens": bench.calibration.contiguous()}, tokens)
    rows = [row for row in ROWS if not only or {row.peer, row.label} & set(only)]
    unknown = [matrix.name for matrix in bench.model.matrices if not is_projection(matrix.name)]
    if unknown:
        for row in rows:
            print(f"| {row.label} | failed: {unknown[0]}, like {len(unknown)} in all, is no *_proj | | | | | |")
        return
    model = float32_copy(bench.model.path, folder / "float32")
    for outcome in run_peers(model, tokens, folder, rows):
        if outcome.weights is None or outcome.facts is None:
            print(f"| {outcome.row.label} | failed: {outcome.error} | | | | | |", flush=True)
            continue
        weights, facts = load_weights(outcome.weights)
        bench.put({name: weight.float() for name, weight in weights.items()})
        bench.row(outcome.row.label, facts["size_bits"], facts["seconds"], facts["peak_bytes"])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="as `compress` takes it")
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS, help="bits per parameter")
    recipes = [PUBLISHED_RECIPE, "fast", "default", "best"]
    parser.add_argument("--recipes", nargs="*", choices=recipes, default=recipes, help="our presets, and LQ-LoRA's")
    parser.add_argument("--peers", nargs="*", help="run them: all, or those named", metavar="PEER_OR_LABEL")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for our rows and the evaluation")
    parser.add_argument("--uniform", nargs="*", default=[], help="one quantizer for all matrices", metavar="LABEL")
    parser.add_argument("--dither", action="store_true", help="take a copy with uniform dither of one step")
    asked = parser.parse_args()
    model = asked.model
    if asked.dither:
        model = str(dithered_copy(open_model(model), home() / "dithered"))
    bench, seconds = Bench(model, asked.device), Seconds()
    print(f"\n### Quality at equal stored bits, {date.today()}{', dithered copy' if asked.dither else ''}\n")
    bench.put(bench.weights)
    print("| method | bits | perplexity | KL, nats/token | top-1 % | seconds | peak GB |")
    print("| --- | --: | --: | --: | --: | --: | --: |", flush=True)
    bench.row("original", 8 * sum(bench.model.tensors[m.name].size_bytes for m in bench.model.matrices), None, None)
    published = Published(bench, seconds) if PUBLISHED_RECIPE in asked.recipes else None
    for budget in asked.budgets:
        print(f"| **budget {budget}** | | | | | | |", flush=True)
        if published is not None:
            published.row(budget)
        for preset in (recipe for recipe in asked.recipes if recipe in PRESETS):
            ours(bench, seconds, f"ours, {preset}", preset, budget)
    if asked.uniform:
        print("| **uniform** | | | | | | |", flush=True)
        uniform(bench, asked.uniform)
    if asked.peers is not None:
        print("| **others, at their own sizes** | | | | | | |", flush=True)
        others(bench, asked.peers)


if __name__ == "__main__":
    main()
