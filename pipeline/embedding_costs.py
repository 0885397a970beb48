"""What packed embeddings or a packed head cost: the divergence that each causes alone, measured on calibration windows.

The cost table has no row for them: the curvature of a head would have a row for every token. But they are one or two,
so the original answers some windows with each table in the place of its own, and the mean divergence of the answers, in
nats a token, stands beside the matrices' expected ones in the integer program (allocation.py).

    work/windows-00000.json    the divergences of each table, summed over a batch that is done; a kill costs a batch
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from pipeline.atomic import write_json
from pipeline.evaluate import batch_of
from pipeline.memory import give_back, is_shortage
from pipeline.model import Model
from pipeline.progress import SILENT, Progress
from pipeline.scoring import answers_to, inference_only
from pipeline.unloaded import original_network

MOST_WINDOWS = 4
SIGNIFICANT_DIGITS = 3  # windows differ by more, and later ones vary with the number of threads

Tables = Mapping[tuple[str, str], Callable[[], Tensor]]  # (module, label) -> reads a weight [tokens, width]


def divergence_of_tables(
    model: Model, tables: Tables, tokens: Tensor, work: Path, *, device: str, progress: Progress = SILENT
) -> dict[str, dict[str, float]]:
    """Module -> label -> mean divergence from the original in nats a token.

    Args:
        tables: what is to be put in the place of a module's own weight, one at a time.
        tokens: int64 [windows, seq_len].
    Raises:
        NonFiniteError: an answer is not finite.
    """
    batch_size = batch_of(tokens.shape[1], model.task.answer_width(model.config))
    files = {start: work / f"windows-{start:05d}.json" for start in range(0, len(tokens), batch_size)}
    missing = [start for start, file in files.items() if not file.exists()]
    network = original_network(model, device) if missing else None
    for start in progress.track(missing, "Packed embeddings", len(files), len(files) - len(missing)):
        assert network is not None
        write_json(files[start], _of_a_batch(model, network, tables, tokens[start : start + batch_size], start))
    del network
    give_back()
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for file in files.values():
        for module, found in json.loads(file.read_text()).items():
            for label, divergence in found.items():
                totals[module][label] += divergence / len(tokens)
    return {
        module: {label: float(f"{total:.{SIGNIFICANT_DIGITS}g}") for label, total in found.items()}
        for module, found in totals.items()
    }


def _of_a_batch(
    model: Model, network: PreTrainedModel, tables: Tables, windows: Tensor, first: int
) -> dict[str, dict[str, float]]:
    """Of each table, the sum of the windows' means; window by window where memory runs out."""
    try:
        return _divergences(model, network, tables, windows, first)
    except Exception as error:
        if not is_shortage(error) or len(windows) == 1:
            raise
    give_back()  # here, where the failed attempt's tensors are gone
    with inference_only(network):
        for module in {module for module, _ in tables}:  # which may have a table in its place
            network.get_parameter(f"{module}.weight").copy_(model.tensor(f"{module}.weight"))
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for number, window in enumerate(windows.split(1), first):
        for module, found in _divergences(model, network, tables, window, number).items():
            for label, divergence in found.items():
                totals[module][label] += divergence
    return totals


def _divergences(
    model: Model, network: PreTrainedModel, tables: Tables, windows: Tensor, first: int
) -> dict[str, dict[str, float]]:
    """The same, of all windows at once."""
    with inference_only(network):
        before = answers_to(network, windows, "the original", first_window=first).float()
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for (module, label), read in tables.items():
        table, parameter = read(), network.get_parameter(f"{module}.weight")
        with inference_only(network):
            parameter.copy_(table)
            named = f"the original with {module} as {label}"
            after = answers_to(network, windows, named, first_window=first).float()
            parameter.copy_(model.tensor(f"{module}.weight"))
            means = [model.task.divergences(*pair).mean() for pair in zip(before, after, strict=True)]
        found[module][label] = sum(max(0.0, float(mean)) for mean in means)
    return found
