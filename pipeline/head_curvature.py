"""What an output head's rows are rounded under: the second moment H of what the head reads (GPTQ, arXiv:2210.17323).

An error e of a row changes its logit by e h for a token whose head reads h, so tr(E H E^T) is the mean squared error of
the logits. (Tokens weighted by how much the divergence heeds their logits, 1 - sum of p^2, did no better: LOG.md.)

Windows go through one block after the other (layered_pass.py), with the weights of one in memory; a kill costs a block.

    work/sums.safetensors              the sum over the windows that are done, float32 [width, width], and their number
    work/out/curvature.safetensors     H, once all are done
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float32
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.atomic import replace_file
from pipeline.errors import NonFiniteError
from pipeline.layered import Network, open_network
from pipeline.layered_pass import forward, hidden_file, read_windows
from pipeline.model import Model
from pipeline.progress import SILENT, Progress
from pipeline.summed_parts import parts_of

CURVATURE_FILE = "curvature.safetensors"


def collect_head_curvature(
    model: Model, tokens: Tensor, work: Path, *, device: str, progress: Progress = SILENT
) -> None:
    """Leave H over `tokens` [windows, seq_len] in `work`/out; goes on from what a killed call saved.

    Args:
        model: predicts tokens.
    Raises:
        NonFiniteError: a block gives a NaN or an infinity, or the head reads one.
    """
    network, sums = open_network(model, device, progress.say), work / "sums.safetensors"
    done = int(load_file(sums)["num_windows"]) if sums.exists() else 0
    passes = _passes(network, tokens.to(device), sums, done)
    counts = {"total": len(tokens) * network.num_blocks, "done": done * network.num_blocks}
    for _ in progress.track(passes, "What the head reads", **counts):
        pass
    (work / "out").mkdir(exist_ok=True)
    curvature = load_file(sums)["sum"] / tokens.numel()
    replace_file(work / "out" / CURVATURE_FILE, lambda path: save_file({"curvature": curvature}, path))


def read_curvature(path: Path) -> Float32[Tensor, "width width"]:
    """H as `collect_head_curvature` wrote it."""
    return load_file(path)["curvature"]


def _passes(network: Network, tokens: Tensor, sums: Path, done: int) -> Iterator[None]:
    """All windows after the first `done`; yields for each block and window."""
    last = network.num_blocks - 1
    for part in parts_of(len(tokens)):
        if part.stop <= done:
            continue
        folder = sums.parent / f"windows-{part.start:05d}"
        folder.mkdir(exist_ok=True)
        windows = tokens[part.start : part.stop]
        yield from forward(network, windows, folder, first=part.start, stop=last)
        hidden = read_windows(folder / hidden_file(last), network)
        held = [load_file(sums, device=str(network.device))["sum"]] if sums.exists() else []
        with network.block(last), _adding(network, held):
            for window, read in zip(windows, hidden, strict=True):
                with torch.no_grad():
                    network.head(window[None], network.through(last, window[None], read))
                yield
        if not torch.isfinite(held[0]).all():
            raise NonFiniteError(
                f"What the output head reads has a NaN or an infinity in one of the calibration windows {part.start} "
                f"to {part.stop - 1}. Check the model with its own text, or try other calibration text."
            )
        stored = {"sum": held[0].cpu(), "num_windows": torch.tensor(part.stop)}
        replace_file(sums, partial(save_file, stored))
        shutil.rmtree(folder)


@contextmanager
def _adding(network: Network, held: list[Tensor]) -> Iterator[None]:
    """The second moment of whatever the head reads inside is added to the sum that `held` has, or will have."""

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read = inputs[0].float().flatten(0, -2)
        if not held:
            held.append(read.new_zeros(read.shape[1], read.shape[1]))
        held[0].addmm_(read.T, read)

    head = network.network.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(head, nn.Module), "a model that predicts tokens has an output head"
    handle = head.register_forward_pre_hook(add)
    try:
        yield
    finally:
        handle.remove()
