"""Calibration: token windows -> LayerStatistics of every matrix.

A part of the windows at a time: part_sums.py collects it, here or elsewhere, block by block, and summed_parts.py adds
it to what there is. Kept on disk: layer-NNN.safetensors with "<matrix>.<sum>" (or "<group>.<sum>", where matrices with
the same input share it), and statistics.json; and of the part under way the blocks that are done.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from pipeline.atomic import write_json
from pipeline.calibration import TokenWindows
from pipeline.curvature_scale import measure_scales
from pipeline.curvature_sums import Metric, Sums, sums_of
from pipeline.degraded import say_all_degraded
from pipeline.divergence_scale import measure_divergences
from pipeline.layered import Network, open_network
from pipeline.model import Matrix, Model
from pipeline.part_sums import collect_part, num_steps
from pipeline.progress import SILENT, Noting, Progress
from pipeline.summed_parts import PART_WINDOWS, SummedParts, layer_file, layers_of, owner_of, parts_of
from pipeline.unreached import fill_unreached
from quantizers import LayerStatistics

FACTS_FILE = "statistics.json"
CHECKED_SHARE = 1 / 8  # of the windows, the last ones, only check the scale of what the others say
SCALE_DIGITS = 4  # the last digits of a sum are not the same from run to run

# Collects parts elsewhere: given all windows [windows, seq_len] and the parts that are missing, yields for each of
# these, in their order, a function from a layer to the part's sums of it.
SpreadParts = Callable[[Tensor, Sequence[range]], Iterator[Callable[[int], dict[str, Tensor]]]]


@dataclass(frozen=True)
class Statistics:
    """Statistics of a whole model, read from disk a matrix at a time."""

    file: Callable[[str], Path]
    metric: Metric
    num_tokens: int
    scales: dict[str, float]

    @staticmethod
    def open(file: Callable[[str], Path]) -> "Statistics":
        """The statistics that `collect_statistics` left; `file` tells where each of its files is now."""
        facts = json.loads(file(FACTS_FILE).read_text())
        return Statistics(file, facts["metric"], facts["num_tokens"], facts["scales"])

    def of(self, matrix: Matrix) -> LayerStatistics:
        """Statistics of one matrix, oriented as `matrix.shape`, scaled so that errors are in nats a token."""
        sums = sums_of(self.metric)
        with safe_open(self.file(layer_file(matrix.layer)), framework="pt") as stored:
            found = {name: stored.get_tensor(f"{owner_of(matrix, sums)}.{name}") for name in sums.shapes(matrix.shape)}
        return sums.statistics(found, self.num_tokens).times(self.scales.get(matrix.name, 1.0))


def notes_of(facts: Path) -> tuple[str, ...]:
    """Of FACTS_FILE, a sentence each: matrices that the text tells nothing about, or whose curvature is singular."""
    return tuple(json.loads(facts.read_text(encoding="utf-8")).get("notes", ()))


def collect_statistics(
    model: Model,
    windows: TokenWindows,
    metric: Metric,
    work: Path,
    *,
    seed: int,
    device: str,
    spread: SpreadParts | None = None,
    progress: Progress = SILENT,
) -> None:
    """Collect over all `windows` and leave the result in `work`/out; goes on from what an earlier call saved.

    Args:
        metric: what to collect, see curvature_sums.py.
        work: folder for the part under way and the result, kept by the caller over kills.
        seed: of the labels that are drawn from the model, where the metric wants such.
        device: where the model runs; the sums are kept there too.
        spread: collects the parts elsewhere; None does it here, one after the other.
    Raises:
        NonFiniteError: an activation, a gradient or the loss is NaN or infinite; names the layer and window.
    """
    sums = sums_of(metric)
    num_checked = _num_checked(sums, len(windows.tokens))
    used, checked = windows.tokens.split([len(windows.tokens) - num_checked, num_checked])
    total = SummedParts(work / "out", layers_of(model))
    network = None
    if total.num_done < len(used):
        if spread is not None:
            _collect_elsewhere(total, used, sums.title, spread, progress)
        else:
            network = open_network(model, device, progress.say)
            _collect_here(total, network, model, used.to(device), sums, work, seed, progress)
    noting = Noting(progress, work / "notes.json")
    facts: dict[str, Any] = {
        "metric": metric,
        "num_sequences": len(used),
        "num_tokens": len(used) * model.task.num_scored(used.shape[1]),
        "tokens_sha256": windows.sha256,
        "scales": {},
    }
    write_json(work / "out" / FACTS_FILE, facts)
    found = Statistics.open(lambda name: work / "out" / name)
    fill_unreached(model.matrices, work / "out", sums, noting.say)
    measure = measure_divergences if sums.scaled_by_divergence else measure_scales
    if measure is measure_divergences or not num_checked:
        say_all_degraded(model.matrices, found.of, noting.say)
    facts["notes"] = noting.notes()
    write_json(work / "out" / FACTS_FILE, facts)
    if measure is measure_divergences and not num_checked:
        checked = used  # a single window says both
    elif not num_checked:
        return
    measured = work / "scales.json"
    if not measured.exists():
        network = network or open_network(model, device, progress.say)
        scales = measure(network, model, found.of, checked.to(device), len(used), work / "scale", seed, noting)
        write_json(measured, {name: float(f"{scale:.{SCALE_DIGITS}g}") for name, scale in scales.items()})
    shutil.rmtree(work / "scale", ignore_errors=True)  # last: half of what is in it would pass for all of it
    facts |= {"scales": json.loads(measured.read_text()), "notes": noting.notes()}
    write_json(work / "out" / FACTS_FILE, facts)


def most_windows_at_once(sums: Sums, num_windows: int) -> int:
    """That pass through the blocks together: a part, or those that check the scale."""
    return max(min(PART_WINDOWS, num_windows), _num_checked(sums, num_windows) if sums.labels_are_drawn else 0)


def _num_checked(sums: Sums, num_windows: int) -> int:
    if num_windows == 1 or not (sums.labels_are_drawn or sums.scaled_by_divergence):
        return 0
    return max(1, round(CHECKED_SHARE * num_windows))


def _collect_here(
    total: SummedParts,
    network: Network,
    model: Model,
    used: Tensor,
    sums: Sums,
    work: Path,
    seed: int,
    progress: Progress,
) -> None:
    parts = [(number, part) for number, part in enumerate(parts_of(len(used))) if part.stop > total.num_done]

    def passes() -> Iterator[None]:
        for number, part in parts:
            folder = work / f"part-{number:05d}"
            folder.mkdir(exist_ok=True)
            tokens, keep = used[part.start : part.stop], partial(total.add_layer, part)
            yield from collect_part(network, model, tokens, part.start, sums, folder, keep, seed=seed)
            shutil.rmtree(folder)

    num_all, num_done = (num_steps(network, sums, num_windows) for num_windows in (len(used), total.num_done))
    for _ in progress.track(passes(), sums.title, total=num_all, done=num_done):
        pass


def _collect_elsewhere(total: SummedParts, used: Tensor, title: str, spread: SpreadParts, progress: Progress) -> None:
    parts = [part for part in parts_of(len(used)) if part.stop > total.num_done]
    num_parts = len(parts_of(len(used)))
    for part, sums_of_layer in zip(
        parts, progress.track(spread(used, parts), title, total=num_parts, done=num_parts - len(parts)), strict=True
    ):
        total.add(part, sums_of_layer)
