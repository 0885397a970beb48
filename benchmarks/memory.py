"""The memory that compressing takes, with made-up Llamas on a CPU: a model larger than it, and depth that costs none.

    python -m benchmarks.memory [--large] [--forecasts] [--folder DIR]

Each run is `bitsmith compress` in a control group that may take so much memory, file cache included, and no more. A
stage's peak is that of its largest process, as the command's summary has it. 1.3 billion parameters within 3 GiB;
with `--large` 7 billion within 6 GiB (13 GiB on disk, hours); and one width with 4, 8, 16 and 32 layers. Last, what
a backward pass over whole models takes, beside our forecasts for them.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.limited import run_limited
from benchmarks.llama_shapes import SHAPES, Shape, write_llama
from pipeline.disk_space import disk_bytes
from pipeline.forecast import forecast
from pipeline.model import open_model
from pipeline.progress import SILENT
from pipeline.recipe import Recipe
from pipeline.run import Run
from pipeline.stages import StageLog
from registry import Registry

GIB = 2**30
CHOICES = ("lloyd2-g32-s4", "lloyd3-g32-s4", "lloyd4-g32-s6")
GROWTH = Shape(512, 1408, 0, 8)
DEPTHS = (4, 8, 16, 32)
FLOAT32_BYTES = 4
# A preset, flags as they are typed, and the recipe's fields that they stand for.
WAYS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("default", "", {}),
    ("fast", " `--sensitivity factored`", {"sensitivity": "factored"}),
)


@dataclass(frozen=True)
class Case:
    """A model, the memory for it, and how much text it reads."""

    name: str
    shape: Shape
    limit_bytes: int
    num_samples: int = 2
    seq_len: int = 128

    def flags(self) -> list[str]:
        """Of `compress`: the preset `fast` with few choices and little text."""
        choices = [word for choice in CHOICES for word in ("--candidate", choice)]
        text = ["--num-samples", self.num_samples, "--seq-len", self.seq_len]
        text += ["--eval-windows", 2, "--eval-seq-len", self.seq_len]
        return ["--preset", "fast", "--budget", "3bpw", "--rank", "0", *choices, *map(str, text)]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="7 billion parameters too")
    parser.add_argument("--forecasts", action="store_true", help="nothing but the forecasts, a minute")
    parser.add_argument("--folder", type=Path, help="for models and results, removed at the end; a temporary one")
    asked = parser.parse_args()
    cases = [Case("1.3B", SHAPES["1.3B"], 3 * GIB)]
    if asked.large:
        cases.append(Case("7B", SHAPES["7B"], 6 * GIB))
    print(f"### Models larger than the memory, {date.today()}\n")
    with tempfile.TemporaryDirectory(prefix="bitsmith-memory-", dir=asked.folder) as folder:
        vocab_size = open_model("demo").config.vocab_size
        if asked.forecasts:
            _print_official(Path(folder), vocab_size)
            return
        figures = [_print_case(case, Path(folder), vocab_size) for case in cases]
        _print_growth(Path(folder), vocab_size)
        _print_official(Path(folder), vocab_size)
    print("; ".join(figures))


def _print_case(case: Case, folder: Path, vocab_size: int) -> str:
    result, how = _compressed(case, folder)
    num_params = case.shape.num_params(vocab_size)
    print(f"{case.name}: {num_params / 1e9:.2f} billion parameters, {2 * num_params / GIB:.1f} GiB in bfloat16, "
          f"limited to {case.limit_bytes / GIB:.0f} GiB by {how}\n")  # fmt: skip
    print("| stage | seconds | forecast | peak, GiB | forecast |\n| --- | --: | --: | --: | --: |")
    for stage in result["stages"]:
        seconds, memory = stage["forecast_seconds"], stage["forecast_memory_bytes"]
        expected = ("", "") if seconds is None else (f"{seconds:.0f}", f"{memory / GIB:.2f}")
        print(f"| {stage['name']} | {stage['seconds']:.0f} | {expected[0]} "
              f"| {stage['peak_memory_bytes'] / GIB:.2f} | {expected[1]} |")  # fmt: skip
    print(flush=True)
    within = f"{case.name} in {case.limit_bytes / GIB:.0f} GiB: peak {_peak(result) / GIB:.2f} GiB"
    return f"{within}, {_forecast(result)} of the forecast"


def _print_growth(folder: Path, vocab_size: int) -> None:
    print(f"Width {GROWTH.width}, by the number of layers\n")
    print("| layers | million parameters | seconds | seconds a layer | peak, GiB | measured / forecast |")
    print("| --: " * 6 + "|")
    for num_layers in DEPTHS:
        case = Case(f"{num_layers} layers", replace(GROWTH, num_layers=num_layers), 2 * GIB)
        result, _ = _compressed(case, folder)
        seconds = sum(stage["seconds"] for stage in result["stages"])
        print(f"| {num_layers} | {case.shape.num_params(vocab_size) / 1e6:.0f} | {seconds:.0f} "
              f"| {seconds / num_layers:.1f} | {_peak(result) / GIB:.2f} | {_forecast(result)} |",
              flush=True)  # fmt: skip
    print()


def _print_official(folder: Path, vocab_size: int) -> None:
    """A backward pass over the whole model, without activations, beside what our forecasts say on this machine."""
    print("| model | weights and gradients of all, float32, GiB | " + " | ".join(
        f"`{preset}`{flags}: {what}, GiB" for preset, flags, _ in WAYS for what in ("memory", "disk")
    ) + " |\n| --- |" + " --: |" * (1 + 2 * len(WAYS)))  # fmt: skip
    for name, shape in SHAPES.items():
        model = write_llama(folder / name, shape, open_model("demo").path, headers_only=True)
        cells = [f"{2 * FLOAT32_BYTES * shape.num_params(vocab_size) / GIB:.0f}"]
        for preset, _, settings in WAYS:
            recipe = Recipe.of(model=str(model), budget="3bpw", preset=preset, **settings)
            run = Run.open(
                recipe, Registry(folder / "registry"), device="cpu", resume=False, log=StageLog(), progress=SILENT
            )
            cells += [f"{max(stage.total_bytes for stage in forecast(run)) / GIB:.1f}", f"{disk_bytes(run) / GIB:.0f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print()


def _compressed(case: Case, folder: Path) -> tuple[dict[str, Any], str]:
    """The command's JSON, and how it was limited.

    Raises:
        SystemExit: it did not end well.
    """
    model = write_llama(folder / "model", case.shape, open_model("demo").path)
    started = time.monotonic()
    command = [sys.executable, "-m", "pipeline", "compress", str(model), "-o", str(folder / "out"), "--json"]
    settings = {"BITSMITH_HOME": str(folder / "home")}
    done, how = run_limited([*command, *case.flags()], case.limit_bytes, **settings)
    if done.returncode:
        sys.exit(f"{case.name} ended with {done.returncode} after {time.monotonic() - started:.0f} s.")
    for made in ("model", "out", "home"):
        shutil.rmtree(folder / made)
    result: dict[str, Any] = json.loads(done.stdout)
    return result, how


def _peak(result: dict[str, Any]) -> int:
    return max(stage["peak_memory_bytes"] for stage in result["stages"])


def _forecast(result: dict[str, Any]) -> str:
    """The least and the most that a stage's peak was of its forecast."""
    stages = [stage for stage in result["stages"] if stage["forecast_memory_bytes"]]
    ratios = [stage["peak_memory_bytes"] / stage["forecast_memory_bytes"] for stage in stages]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


if __name__ == "__main__":
    main()
