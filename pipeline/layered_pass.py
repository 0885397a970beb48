"""Token windows through one block after the other, and their losses' gradients back from the last block to the first.

With the weights of one block in memory (layered.py), what passes between blocks is kept on disk:

    folder/hidden-003.safetensors      what block 3 reads, float32 [windows, seq_len, width]
    folder/gradient-003.safetensors    the gradient of each window's loss with respect to that

A file that is there is not made again, so a kill costs one block. On the way back each block's forward pass is done a
second time, which is the price of not keeping what it computes inside.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.atomic import replace_file
from pipeline.errors import NonFiniteError
from pipeline.layered import Network

# What is done with a block: called with its number and a function that passes the windows through it, one by one,
# and yields the number of each when it is through.
AtBlock = Callable[[int, Callable[[], Iterator[int]]], None]


def forward(
    network: Network, tokens: Tensor, folder: Path, at_block: AtBlock | None = None, *, first: int
) -> Iterator[int]:
    """Pass `tokens` [windows, seq_len] forward; yields each block's number when it is done.

    Args:
        first: number of the first window, for errors.
    Raises:
        NonFiniteError: a block gives a NaN or an infinity; names it, and the window.
    """
    embedded = folder / hidden_file(0)
    if not embedded.exists():
        _write(embedded, [network.embed(window[None]) for window in tokens])
    for index in range(network.num_blocks):
        target = folder / hidden_file(index + 1)
        if not target.exists():
            hidden = _read(folder / hidden_file(index), network)
            passed: list[Tensor] = []

            def run(index: int = index, hidden: list[Tensor] = hidden, passed: list[Tensor] = passed) -> Iterator[int]:
                for number, window in enumerate(tokens):
                    with torch.no_grad():
                        output = network.through(index, window[None], hidden[number])
                    _check_finite(output, network.name(index), first + number)
                    passed.append(output)
                    yield number

            with network.block(index):
                (at_block or _only_run)(index, run)
            _write(target, passed)
        yield index


def backward(
    network: Network,
    tokens: Tensor,
    folder: Path,
    at_block: AtBlock,
    *,
    first: int,
    label_seed: int | None,
) -> Iterator[int]:
    """The gradients of each window's summed loss, after `forward`; yields each block's number when it is done.

    Args:
        first: number of the first window, for the labels and for errors.
        label_seed: labels are drawn from the model, window w with `label_seed` + w; None takes the text's own.
    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    last = folder / gradient_file(network.num_blocks)
    if not any(folder.glob("gradient-*.safetensors")):
        hidden = _read(folder / hidden_file(network.num_blocks), network)
        _write(
            last,
            [
                _loss_gradient(network, window, hidden[number], first + number, label_seed)
                for number, window in enumerate(tokens)
            ],
        )
    for index in reversed(range(network.num_blocks)):
        target, above = folder / gradient_file(index), folder / gradient_file(index + 1)
        if not target.exists() and above.exists():
            gradients: list[Tensor] = []

            def run(index: int = index, above: Path = above, gradients: list[Tensor] = gradients) -> Iterator[int]:
                hidden, behind = _read(folder / hidden_file(index), network), _read(above, network)
                for number, window in enumerate(tokens):
                    here = hidden[number].requires_grad_(True)
                    with torch.enable_grad():
                        network.through(index, window[None], here).backward(behind[number])
                    assert here.grad is not None
                    gradients.append(here.grad)
                    yield number

            with network.block(index):
                at_block(index, run)
            _write(target, gradients)
            above.unlink()
        yield index


def hidden_file(index: int) -> str:
    """Name of the file with what block `index` reads."""
    return f"hidden-{index:03d}.safetensors"


def gradient_file(index: int) -> str:
    """Name of the file with the gradients with respect to what block `index` reads."""
    return f"gradient-{index:03d}.safetensors"


def drawn_labels(logits: Tensor, seed: int) -> Tensor:
    """A label for each row of logits, drawn from the model's own prediction (on the CPU, alike for every device)."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative, points * cumulative[:, -1:])[:, 0].clamp_max(logits.shape[1] - 1)


def _loss_gradient(network: Network, window: Tensor, hidden: Tensor, index: int, label_seed: int | None) -> Tensor:
    here = hidden.requires_grad_(True)
    with torch.enable_grad():
        logits = network.head(window[None], here)[0, :-1].float()
        labels = window[1:] if label_seed is None else drawn_labels(logits.detach(), label_seed + index)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    if not math.isfinite(loss.item()):
        raise NonFiniteError(
            f"The loss of calibration window {index} is {loss.item()}. The model overflows or its weights "
            "are damaged; check the model with its own text first."
        )
    loss.backward()
    assert here.grad is not None
    return here.grad


def _check_finite(output: Tensor, block: str, window: int) -> None:
    if not math.isfinite(output.sum().item()):  # one pass; a NaN or an infinity survives a sum
        raise NonFiniteError(
            f"What {block} gives has a NaN or an infinity in calibration window {window}. Check the model with its own "
            "text, or try other calibration text."
        )


def _only_run(index: int, run: Callable[[], Iterator[int]]) -> None:
    for _ in run():
        pass


def _read(path: Path, network: Network) -> list[Tensor]:
    """Each window as a copy: a tensor in a mapped file lies at any address, on which last bits depend."""
    return [window.clone() for window in load_file(path, device=str(network.device))["windows"].split(1)]


def _write(path: Path, windows: list[Tensor]) -> None:
    stacked = {"windows": torch.cat(windows).cpu().contiguous()}
    replace_file(path, lambda target: save_file(stacked, target))
