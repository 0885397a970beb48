"""Calibration: token windows -> LayerStatistics of every matrix.

One forward and one backward pass a window. The weights themselves take no gradient: a hook on each layer's output
sees the layer's input x [tokens, in] and, later, the output's gradient g [tokens, out]; what they add to the running
sums is said by curvature_sums.py. So the memory is the model, the sums, and one weight gradient.

Kept on disk: layer-NN.safetensors with "<matrix>.<sum>" (or "<group>.<sum>", where matrices with the same input
share it), and statistics.json. While collecting, the running sums are saved often enough that a kill loses little and
seldom enough that saving takes under a twentieth of the time.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.atomic import replace_file, write_json
from pipeline.calibration import TokenWindows
from pipeline.curvature_scale import measure_scales
from pipeline.curvature_sums import Metric, Sums, sums_of
from pipeline.degraded import say_all_degraded
from pipeline.errors import NonFiniteError
from pipeline.model import Matrix, Model
from pipeline.progress import SILENT, Progress
from quantizers import LayerStatistics

SAVE_SHARE = 0.05  # of the time may go into saving the running sums
CHECKED_SHARE = 1 / 8  # of the windows, the last ones, only check the scale of what the others say
SCALE_DIGITS = 4  # the last digits of a sum are not the same from run to run


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
        facts = json.loads(file("statistics.json").read_text())
        return Statistics(file, facts["metric"], facts["num_tokens"], facts["scales"])

    def of(self, matrix: Matrix) -> LayerStatistics:
        """Statistics of one matrix, oriented as `matrix.shape`, scaled so that errors are in nats a token."""
        sums = sums_of(self.metric)
        with safe_open(self.file(_layer_file(matrix.layer)), framework="pt") as stored:
            found = {name: stored.get_tensor(f"{_owner(matrix, sums)}.{name}") for name in sums.shapes(matrix.shape)}
        return sums.statistics(found, self.num_tokens).times(self.scales.get(matrix.name, 1.0))


def collect_statistics(
    model: Model,
    windows: TokenWindows,
    metric: Metric,
    work: Path,
    *,
    seed: int,
    device: str,
    progress: Progress = SILENT,
) -> None:
    """Collect over all `windows` and leave the result in `work`/out; goes on from what an earlier call saved.

    Args:
        metric: what to collect, see curvature_sums.py.
        work: folder for the running sums and the result, kept by the caller over kills.
        seed: of the labels that are drawn from the model, where the metric wants such.
        device: where the model runs; the sums are kept there too.
    Raises:
        NonFiniteError: an activation, a gradient or the loss is NaN or infinite; names the layer and window.
    """
    sums = sums_of(metric)
    num_checked = max(1, round(CHECKED_SHARE * len(windows.tokens))) if sums.labels_are_drawn else 0
    if num_checked == len(windows.tokens):
        num_checked = 0  # a single window
    used, checked = windows.tokens.split([len(windows.tokens) - num_checked, num_checked])
    running = _RunningSums.restore(work, model, sums, device)
    network = None
    if running.num_done < len(used) or num_checked:
        network = model.load(device=device, dtype=torch.float32)
        network.requires_grad_(False)
    if network is not None and running.num_done < len(used):
        with _collecting(network, model, sums, running):
            todo = used[running.num_done :]
            for tokens in progress.track(todo, sums.title, total=len(used), done=running.num_done):
                _one_window(network, tokens.to(device), sums, running.num_done, seed)
                running.num_done += 1
                running.save_if_due()
        running.save()
    facts: dict[str, Any] = {
        "metric": metric,
        "num_sequences": len(used),
        "num_tokens": used.numel(),
        "tokens_sha256": windows.sha256,
        "scales": {},
    }
    _write(model, running, work / "out", facts)
    found = Statistics.open(lambda name: work / "out" / name)
    if not num_checked:
        say_all_degraded(model.matrices, found.of, progress.say)
    elif network is not None:

        def run_windows() -> Iterator[int]:
            titled = progress.track(checked, "Scale of the curvature", total=num_checked)
            for index, tokens in enumerate(titled, start=len(used)):
                _one_window(network, tokens.to(device), sums, index, seed)
                yield tokens.numel()

        scales = measure_scales(network, model, found.of, run_windows, seed=seed, device=device, say=progress.say)
        facts["scales"] = {name: float(f"{scale:.{SCALE_DIGITS}g}") for name, scale in scales.items()}
        write_json(work / "out" / "statistics.json", facts)


class _RunningSums:
    def __init__(self, work: Path, sums: dict[str, Tensor], num_done: int) -> None:
        self.work, self.sums, self.num_done = work, sums, num_done
        self._save_seconds = 0.0
        self._saved_at = time.monotonic()

    @staticmethod
    def restore(work: Path, model: Model, kind: Sums, device: str) -> "_RunningSums":
        """From the newest complete save, else zeros."""
        saves = sorted(work.glob("sums-*.safetensors"))
        if saves:
            sums = {name: tensor.to(device) for name, tensor in load_file(saves[-1]).items()}
            return _RunningSums(work, sums, int(saves[-1].stem.removeprefix("sums-")))
        zeros: dict[str, Tensor] = {}
        for matrix in model.matrices:
            for name, shape in kind.shapes(matrix.shape).items():
                zeros.setdefault(f"{_owner(matrix, kind)}.{name}", torch.zeros(shape, device=device))
        return _RunningSums(work, zeros, 0)

    def save_if_due(self) -> None:
        if time.monotonic() - self._saved_at > self._save_seconds / SAVE_SHARE:
            self.save()

    def save(self) -> None:
        started = time.monotonic()
        target = self.work / f"sums-{self.num_done:08d}.safetensors"
        if not target.exists():
            replace_file(target, lambda path: save_file(self.sums, path))
            for older in self.work.glob("sums-*.safetensors"):
                if older != target:
                    older.unlink()
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - started


def _one_window(network: PreTrainedModel, tokens: Tensor, sums: Sums, index: int, seed: int) -> None:
    embedded = network.get_input_embeddings()(tokens[None]).requires_grad_(True)
    logits = network(inputs_embeds=embedded, use_cache=False).logits[0, :-1].float()
    labels = _drawn(logits.detach(), seed + index) if sums.labels_are_drawn else tokens[1:]
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    if not math.isfinite(loss.item()):
        raise NonFiniteError(
            f"The loss of calibration window {index} is {loss.item()}. The model overflows or its weights "
            "are damaged; check the model with its own text first."
        )
    loss.backward()


def _drawn(logits: Tensor, seed: int) -> Tensor:
    """A label for each row of logits, drawn from the model's own prediction (on the CPU, alike for every device)."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative, points * cumulative[:, -1:])[:, 0].clamp_max(logits.shape[1] - 1)


@contextmanager
def _collecting(network: nn.Module, model: Model, sums: Sums, running: _RunningSums) -> Iterator[None]:
    """Hooks on every matrix's layer while the block runs."""
    seen: set[str] = set()
    with ExitStack() as stack:
        for matrix in model.matrices:
            owner = _owner(matrix, sums)
            if owner in seen:
                continue
            seen.add(owner)
            held = {name: running.sums[f"{owner}.{name}"] for name in sums.shapes(matrix.shape)}
            hook = _layer_hook(matrix, sums, held, running)
            handle = network.get_submodule(matrix.module).register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


def _layer_hook(matrix: Matrix, sums: Sums, held: dict[str, Tensor], running: _RunningSums):
    def check(tensor: Tensor, what: str) -> None:
        if not math.isfinite(tensor.sum().item()):  # one pass; a NaN or an infinity survives a sum
            raise NonFiniteError(
                f"The {what} of {matrix.module} has a NaN or an infinity in calibration window {running.num_done}. "
                "Check the model with its own text, or try other calibration text."
            )

    def on_forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().float().reshape(-1, matrix.shape[1])
        check(x, "input")

        def on_backward(gradient: Tensor) -> None:
            g = gradient.float().reshape(-1, matrix.shape[0])
            check(g, "gradient")
            sums.add(held, x, g)

        output.register_hook(on_backward)

    return on_forward


def _owner(matrix: Matrix, sums: Sums) -> str:
    """Whose the sums are: the matrix's, or its group's where they come from the input alone."""
    return matrix.group if sums.of_input_alone else matrix.name


def _write(model: Model, running: _RunningSums, out: Path, facts: dict[str, Any]) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for layer in sorted({matrix.layer for matrix in model.matrices}):
        owners = {name for m in model.matrices if m.layer == layer for name in (m.name, m.group)}
        names = [name for name in running.sums if name.rpartition(".")[0] in owners]
        save_file({name: running.sums[name].cpu() for name in names}, out / _layer_file(layer))
    write_json(out / "statistics.json", facts)


def _layer_file(layer: int) -> str:
    return f"layer-{layer:03d}.safetensors"
