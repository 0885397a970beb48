"""Fisher diagonals of a few matrices of the demo model from two disjoint halves of the calibration windows.

What is fitted to one half can be judged by the other: a gain that only one of them sees is noise.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from pipeline.calibration import token_windows
from pipeline.display import Bars
from pipeline.model import Matrix, open_model
from pipeline.statistics import Statistics, collect_statistics
from quantizers import LayerStatistics

SEQ_LEN = 512  # tokens a window, as in the default recipe


@dataclass(frozen=True)
class Halves:
    """One matrix, float32 [out, in], and its statistics from the first and from the second half."""

    matrix: Matrix
    weight: Tensor
    first: LayerStatistics
    second: LayerStatistics


def fisher_halves(layers: tuple[int, ...], num_windows: int, work: Path) -> list[Halves]:
    """Collect over 2 x `num_windows` windows, or take from `work` what an earlier call left there."""
    model = open_model("demo")
    model = replace(model, matrices=tuple(matrix for matrix in model.matrices if matrix.layer in layers))
    windows = token_windows(None, model.tokenizer(), num_windows=2 * num_windows, seq_len=SEQ_LEN, seed=0)
    halves = []
    for half in (0, 1):
        folder = work / f"{num_windows} windows, layers {'-'.join(map(str, layers))}" / f"half-{half}"
        if not (folder / "out" / "statistics.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            collect_statistics(
                model, replace(windows, tokens=windows.tokens[half::2]), folder, device="cpu", progress=Bars()
            )
        halves.append(Statistics.open(lambda name, out=folder / "out": out / name))
    return [Halves(m, model.weight(m), halves[0].of(m), halves[1].of(m)) for m in model.matrices]
