"""What packed embeddings or a packed head cost: the divergence that each causes alone, measured on calibration windows.

The cost table has no row for them: the curvature of a head would have a row for every token. But they are one or two,
so the original answers some windows with each table in the place of its own, and the mean divergence of the answers, in
nats a token, stands beside the matrices' expected ones in the integer program (allocation.py).

    work/window-00000.json    the divergence of each table in a window that is done; a kill costs a window
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from pipeline.atomic import write_json
from pipeline.memory import give_back
from pipeline.model import Model
from pipeline.progress import SILENT, Progress
from pipeline.scoring import answers_to, inference_only
from pipeline.unloaded import original_network

MOST_WINDOWS = 4
SIGNIFICANT_DIGITS = 3  # windows differ by more, and later ones vary with the number of threads


def divergence_of_tables(
    model: Model,
    tables: Mapping[tuple[str, str], Callable[[], Tensor]],
    tokens: Tensor,
    work: Path,
    *,
    device: str,
    progress: Progress = SILENT,
) -> dict[str, dict[str, float]]:
    """Module -> label -> mean divergence from the original in nats a token, over the last `MOST_WINDOWS` windows.

    Args:
        tables: (module, label) -> reads the weight [tokens, width] to be put in the place of the module's own.
        tokens: int64 [windows, seq_len].
    Raises:
        NonFiniteError: an answer is not finite.
    """
    windows = tokens[-MOST_WINDOWS:]
    files = [work / f"window-{index:05d}.json" for index in range(len(windows))]
    missing = [index for index, file in enumerate(files) if not file.exists()]
    network = original_network(model, device) if missing else None
    for index in progress.track(missing, "Packed embeddings", len(windows), len(windows) - len(missing)):
        assert network is not None
        with inference_only(network):
            write_json(files[index], _divergences(model, network, tables, windows[index], index))
    del network
    give_back()
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for file in files:
        for module, found in json.loads(file.read_text()).items():
            for label, divergence in found.items():
                totals[module][label] += divergence / len(windows)
    return {
        module: {label: float(f"{total:.{SIGNIFICANT_DIGITS}g}") for label, total in found.items()}
        for module, found in totals.items()
    }


def _divergences(
    model: Model, network, tables: Mapping[tuple[str, str], Callable[[], Tensor]], window: Tensor, index: int
) -> dict[str, dict[str, float]]:
    """Of one window."""
    before = answers_to(network, window[None], "the original", first_window=index)[0].float()
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for (module, label), read in tables.items():
        parameter = network.get_parameter(f"{module}.weight")
        parameter.copy_(read())
        name = f"the original with {module} as {label}"
        after = answers_to(network, window[None], name, first_window=index)[0].float()
        parameter.copy_(model.tensor(f"{module}.weight"))
        found[module][label] = float(model.task.divergences(before, after).mean().clamp_min(0.0))
    return found
