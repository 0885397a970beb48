"""What each step of the default recipe is worth: the recipe with one step left out, or one more, at equal stored bits.

    python -m benchmarks.ablation [--model demo] [--budgets 2.5 3.0] [--only STEP ...] [--device cuda]

Prints one Markdown table. A row has its own cost table and plan, so that the program makes the best of what is left.
"""

import argparse
from datetime import date
from typing import Any

from benchmarks.quality import Bench, Seconds, ours
from pipeline.recipe import PRESETS

SCALARS = ("lloyd6-g64-s6", "nf8-g64-s8")  # of the default
STEPS: dict[str, dict[str, Any]] = {
    "default": {},
    "factors from gradients of whole windows (sketch of YAQA)": {"sensitivity": "sequence"},
    "without gradients (second moment of the input, one-sided)": {"sensitivity": "input"},
    "without curvature and feedback (Fisher diagonal)": {"sensitivity": "fisher"},
    "without feedback (row and column means of the Fisher diagonal)": {"sensitivity": "factored"},
    "without trellis (scalar codebooks)": {"candidates": PRESETS["fast"]["candidates"]},
    "with integers for trellises": {"candidates": (*(f"int{bits}-g64-s6" for bits in range(2, 6)), *SCALARS)},
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


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="as `compress` takes it")
    parser.add_argument("--budgets", type=float, nargs="+", default=(2.5, 3.0), help="bits per parameter")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    asked = parser.parse_args()
    bench, seconds = Bench(asked.model, asked.device), Seconds()
    print(f"\n### What each step is worth, {date.today()}\n")
    print("| recipe | bits | perplexity | KL, nats/token | top-1 % | seconds | peak GB |")
    print("| --- | --: | --: | --: | --: | --: | --: |", flush=True)
    for budget in asked.budgets:
        print(f"| **budget {budget}** | | | | | | |", flush=True)
        for name in asked.only:
            ours(bench, seconds, name, "default", budget, **STEPS[name])


if __name__ == "__main__":
    main()
