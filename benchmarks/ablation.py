"""What each step of the default recipe is worth: the recipe with one step left out, or one more, at equal stored bits.

    python -m benchmarks.ablation [--model demo] [--budgets 2.5 3.0] [--only STEP ...]

Prints one Markdown table. A row has its own cost table and plan, so that the program makes the best of what is left.
"""

import argparse
from datetime import date
from typing import Any

from benchmarks.quality import Bench, Seconds, ours, quantized
from pipeline.model import Matrix
from pipeline.recipe import PRESETS
from pipeline.statistics import Statistics
from quantizers import LayerStatistics, quantizer_from_label

STEPS: dict[str, dict[str, Any]] = {
    "default": {},
    "without the output factor (input curvature weighted with gradients)": {"sensitivity": "sequence"},
    "without gradients (plain input curvature)": {"sensitivity": "input"},
    "without trellis (scalar codebooks, blocks)": {"candidates": PRESETS["fast"]["candidates"]},
    "without curvature (Fisher diagonal, scalar codebooks)": {
        "sensitivity": "fisher",
        "candidates": PRESETS["fast"]["candidates"],
    },
    "without low-rank parts": {"ranks": (0,)},
    "with 1024 states": {"candidates": PRESETS["best"]["candidates"]},
    "with recovery": {"recover": True},
    "with 1024 states and recovery": {"candidates": PRESETS["best"]["candidates"], "recover": True},
}
NO_FEEDBACK = "without feedback (the default's plan)"


def without_feedback(bench: Bench, budget: float) -> None:
    """The default's plan, with factors cut to their diagonals: the same weights, and nothing to pass errors on by."""
    run = bench.run_of("default", budget)
    artifact = run.statistics()
    assert artifact is not None
    plan = run.read_plan(run.plan(run.costs(artifact), artifact))
    labels = {matrix.name: plan.matrices[matrix.module].label for matrix in bench.model.matrices}
    statistics = Statistics.open(lambda name: bench.registry.path(artifact, name))

    def diagonal(matrix: Matrix) -> LayerStatistics:
        learnt = statistics.of(matrix)
        assert learnt.input_curvature is not None
        assert learnt.output_curvature is not None
        return LayerStatistics(
            input_curvature=learnt.input_curvature.diagonal().diag(),
            output_curvature=learnt.output_curvature.diagonal().diag(),
        )

    quantized(bench, NO_FEEDBACK, lambda matrix: quantizer_from_label(labels[matrix.name]), diagonal)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="as `compress` takes it")
    parser.add_argument("--budgets", type=float, nargs="+", default=(2.5, 3.0), help="bits per parameter")
    parser.add_argument(
        "--only", nargs="+", choices=[*STEPS, NO_FEEDBACK], default=[*STEPS, NO_FEEDBACK], metavar="STEP"
    )
    asked = parser.parse_args()
    bench, seconds = Bench(asked.model), Seconds()
    print(f"\n### What each step is worth, {date.today()}\n")
    print("| recipe | bits | perplexity | KL, nats/token | top-1 % | seconds | peak GB |")
    print("| --- | --: | --: | --: | --: | --: | --: |", flush=True)
    for budget in asked.budgets:
        print(f"| **budget {budget}** | | | | | | |", flush=True)
        for name in asked.only:
            if name == NO_FEEDBACK:
                without_feedback(bench, budget)
            else:
                ours(bench, seconds, name, "default", budget, **STEPS[name])


if __name__ == "__main__":
    main()
