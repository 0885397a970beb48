"""What each step of the default recipe is worth: the recipe with one step left out, or one more, at equal stored bits.

    python -m benchmarks.ablation [--model demo] [--budgets 2.5 3.0] [--only STEP ...] [--device cuda]

Prints one Markdown table. A row has its own cost table and plan, so that the program makes the best of what is left;
but those of ROUNDINGS, which no recipe has, decompose the default's own plan in another way.
"""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import date
from typing import Any
from unittest.mock import patch

from torch import Tensor

from benchmarks.quality import Bench, Seconds, ours, quantized
from pipeline.model import Matrix
from pipeline.recipe import PRESETS
from pipeline.statistics import Statistics
from quantizers import LayerStatistics, quantizer_from_label

SCALARS = ("lloyd6-g64-s6", "nf8-g64-s8")  # of the default
STEPS: dict[str, dict[str, Any]] = {
    "default": {},
    "factors from gradients of whole windows (sketch of YAQA)": {"sensitivity": "sequence"},
    "with gradients but one-sided (GuidedQuant in one group)": {"sensitivity": "guided"},
    "without gradients (second moment of the input, one-sided)": {"sensitivity": "input"},
    "without curvature and feedback (Fisher diagonal)": {"sensitivity": "fisher"},
    "without feedback (row and column means of the Fisher diagonal)": {"sensitivity": "factored"},
    "without trellis (scalar codebooks)": {"candidates": PRESETS["fast"]["candidates"]},
    "with integers for trellises": {"candidates": (*(f"int{bits}-g64-s6" for bits in range(2, 6)), *SCALARS)},
    "with learned levels for trellises": {"candidates": (*(f"kmeans{bits}-g64-s6" for bits in range(2, 6)), *SCALARS)},
    "with E8 lattices for trellises": {"candidates": (*(f"e8p{bits}" for bits in range(2, 5)), *SCALARS)},
    "without curvature, feedback and trellis (Fisher diagonal, scalar codebooks)": {
        "sensitivity": "fisher",
        "candidates": PRESETS["fast"]["candidates"],
    },
    "without low-rank parts": {"ranks": (0,)},
    "with low-rank parts in 16 bits": {"factor_bits": (16,)},
    "with bits by tiles": {"candidates": (*(f"vtrellis{quarters / 4:g}-l12" for quarters in range(4, 21)), *SCALARS)},
    "with 1024 states": {
        "candidates": ("trellis1", "trellis2-l10", "trellis3-l10", "trellis4-l10", "trellis5", *SCALARS)
    },
    "with 256 states": {"candidates": (*(f"trellis{bits}" for bits in range(1, 6)), *SCALARS)},
    "with recovery": {"recover": True},
}


def one_sided(learnt: LayerStatistics) -> LayerStatistics:
    """Without the outputs' factor."""
    return LayerStatistics(input_curvature=learnt.input_curvature)


def diagonal(learnt: LayerStatistics) -> LayerStatistics:
    """The diagonal alone, so that no error can be fed back."""
    assert learnt.output_curvature is not None
    return LayerStatistics(fisher_diag=learnt.importance(len(learnt.output_curvature)))


def unchanged(x: Tensor, seed: int, dim: int = -1) -> Tensor:
    """In the place of quantizers.hadamard's `rotate` and `unrotate`."""
    return x


def without_rotation() -> AbstractContextManager[Any]:
    """Codes are of the weights as they are."""
    return patch.multiple("quantizers.rotated_format", rotate=unchanged, unrotate=unchanged)


@dataclass(frozen=True)
class Rounding:
    """Another way to decompose the same plan."""

    learnt: Callable[[LayerStatistics], LayerStatistics] = lambda learnt: learnt
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


ROUNDINGS = {
    "its plan, without the outputs' factor (errors fed back within rows alone)": Rounding(learnt=one_sided),
    "its plan, without feedback (the curvature's diagonal)": Rounding(learnt=diagonal),
    "its plan, without rotation (incoherence processing)": Rounding(context=without_rotation),
}


def main() -> None:
    """See the module's docstring."""
    names = [*STEPS, *ROUNDINGS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="as `compress` takes it")
    parser.add_argument("--budgets", type=float, nargs="+", default=(2.5, 3.0), help="bits per parameter")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STEP")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    asked = parser.parse_args()
    bench, seconds = Bench(asked.model, asked.device), Seconds()
    print(f"\n### What each step is worth, {date.today()}\n")
    print("| recipe | bits | perplexity | KL, nats/token | top-1 % | seconds | peak GB |")
    print("| --- | --: | --: | --: | --: | --: | --: |", flush=True)
    for budget in asked.budgets:
        print(f"| **budget {budget}** | | | | | | |", flush=True)
        for name in asked.only:
            if name in STEPS:
                ours(bench, seconds, name, "default", budget, **STEPS[name])
            else:
                other(bench, name, budget, ROUNDINGS[name])


def other(bench: Bench, name: str, budget: float, rounding: Rounding) -> None:
    """The default's plan for the budget, decomposed in another way and kept nowhere."""
    run = bench.run_of("default", budget)
    artifact = run.statistics()
    costs = run.costs(artifact)
    assert artifact is not None
    assert costs is not None
    matrices = run.results.plan(run.plan(costs, artifact)).matrices
    statistics = Statistics.open(lambda file: bench.registry.path(artifact, file))

    def learnt(matrix: Matrix) -> LayerStatistics | None:
        return rounding.learnt(statistics.of(matrix))

    with rounding.context():
        quantized(bench, name, lambda matrix: quantizer_from_label(matrices[matrix.module].label), learnt)


if __name__ == "__main__":
    main()
