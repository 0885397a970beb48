"""Token windows through one block after the other, and their losses' gradients back from the last block to the first.

With the weights of one block in memory (layered.py), what passes between blocks is kept on disk:

    folder/hidden-003.safetensors      what block 3 reads, float32 [windows, seq_len, width]
    folder/gradient-003.safetensors    the gradient of each window's loss with respect to that

A file that is there is not made again, so a kill costs one block, or the tail (tail.py): as many of the last blocks as
memory holds at once. On the way back each other block's forward pass is done a second time, which is the price of not
keeping what it computes inside.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import repeat
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.atomic import replace_file
from pipeline.errors import NonFiniteError
from pipeline.layered import Network

# Entered around the windows that pass these blocks; what it gives is called after each of them.
AtBlocks = Callable[[range], AbstractContextManager[Callable[[], None]]]


def forward(
    network: Network, tokens: Tensor, folder: Path, at_blocks: AtBlocks | None = None, *, first: int, stop: int
) -> Iterator[None]:
    """Pass `tokens` [windows, seq_len] forward through the blocks before `stop`; yields for each block and window.

    Args:
        first: number of the first window, for errors.
    Raises:
        NonFiniteError: a block gives a NaN or an infinity; names it, and the window.
    """
    embedded = folder / hidden_file(0)
    if not embedded.exists():
        _write(embedded, [network.embed(window[None]) for window in tokens])
    for index in range(stop):
        target = folder / hidden_file(index + 1)
        if target.exists():
            yield from repeat(None, len(tokens))
            continue
        hidden = read_windows(folder / hidden_file(index), network)
        passed: list[Tensor] = []
        with network.block(index), (at_blocks or _nothing)(range(index, index + 1)) as window_is_done:
            for number, window in enumerate(tokens):
                with torch.no_grad():
                    output = network.through(index, window[None], hidden[number])
                _check_finite(output, network.name(index), first + number)
                passed.append(output)
                window_is_done()
                yield
        _write(target, passed)


def there_and_back(
    network: Network,
    tokens: Tensor,
    folder: Path,
    at_blocks: AtBlocks,
    *,
    tail: range,
    first: int,
    label_seed: int | None,
) -> Iterator[None]:
    """Pass `tokens` [windows, seq_len] forward, and the gradients of each window's summed loss back.

    Args:
        at_blocks: where gradients pass.
        tail: the last blocks, which do both at once (tail.py); all others are passed one by one.
        first: number of the first window, for the labels and for errors.
        label_seed: labels are drawn from the model, window w with `label_seed` + w; None takes the text's own.
    Yields:
        Twice for each block and window.
    Raises:
        NonFiniteError: a block gives a NaN or an infinity, or a loss is NaN or infinite.
    """

    def back_from_loss(number: int, output: Tensor) -> None:
        _loss(network, tokens[number], output, first + number, label_seed).backward()

    written = [_block_of(path) for path in folder.glob("gradient-*.safetensors")]
    if written:  # by a call whose tail may have been another, as memory was
        reached = min(written)
        yield from repeat(None, (2 * tail.stop - reached) * len(tokens))
    else:
        reached = tail.start
        yield from forward(network, tokens, folder, first=first, stop=reached)
        for _ in _back_through(tail, network, tokens, folder, at_blocks, back_from_loss):
            yield from repeat(None, 2 * len(tail))
    for index in reversed(range(reached)):
        above = folder / gradient_file(index + 1)
        behind = read_windows(above, network)

        def back_from_gradient(number: int, output: Tensor, behind: list[Tensor] = behind) -> None:
            output.backward(behind[number])

        yield from _back_through(range(index, index + 1), network, tokens, folder, at_blocks, back_from_gradient)
        above.unlink()


def _back_through(
    blocks: range,
    network: Network,
    tokens: Tensor,
    folder: Path,
    at_blocks: AtBlocks,
    back: Callable[[int, Tensor], None],
) -> Iterator[None]:
    """Write the gradient file of the first of `blocks`; yields for each window.

    Args:
        back: called with a window's number and the last block's output, whose gradient it has flow back.
    """
    hidden = read_windows(folder / hidden_file(blocks.start), network)
    gradients: list[Tensor] = []
    with ExitStack() as stack:
        for index in blocks:
            stack.enter_context(network.block(index))
        window_is_done = stack.enter_context(at_blocks(blocks))
        for number, window in enumerate(tokens):
            here = output = hidden[number].requires_grad_(True)
            with torch.enable_grad():
                for index in blocks:
                    output = network.through(index, window[None], output)
                back(number, output)
            del output
            assert here.grad is not None
            gradients.append(here.grad)
            window_is_done()
            yield
    _write(folder / gradient_file(blocks.start), gradients)


def on_gradient(output: Tensor, seen: Callable[[Tensor], None]) -> Tensor | None:
    """For a hook on a layer: have `seen` called with the gradient of its output; what the hook is to return.

    Weights take no gradients here, so an output does only if what the layer reads does; a table of parameters does not.
    What a network computes without gradients has none.
    """
    if not torch.is_grad_enabled():
        return None
    if not output.requires_grad:
        output = output + output.new_zeros((), requires_grad=True)
    output.register_hook(seen)
    return output


def hidden_file(index: int) -> str:
    """Name of the file with what block `index` reads."""
    return f"hidden-{index:03d}.safetensors"


def gradient_file(index: int) -> str:
    """Name of the file with the gradients with respect to what block `index` reads."""
    return f"gradient-{index:03d}.safetensors"


def _block_of(gradient: Path) -> int:
    return int(gradient.stem.removeprefix("gradient-"))


def _loss(network: Network, window: Tensor, hidden: Tensor, index: int, label_seed: int | None) -> Tensor:
    answer = network.head(window[None], hidden)[0].float()
    loss = network.task.loss(answer, window, (label_seed or 0) + index, label_seed is not None)
    if not math.isfinite(loss.item()):
        raise NonFiniteError(
            f"The loss of calibration window {index} is {loss.item()}. The model overflows or its weights "
            "are damaged; check the model with its own text first."
        )
    return loss


def loss_bytes(num_tokens: int, answer_width: int, is_drawn: bool) -> int:
    """What a loss takes: logits, log-probabilities and gradients, or logits and doubles to draw labels from."""
    return num_tokens * answer_width * (28 if is_drawn else 20)


def _check_finite(output: Tensor, block: str, window: int) -> None:
    if not math.isfinite(output.sum().item()):  # one pass; a NaN or an infinity survives a sum
        raise NonFiniteError(
            f"What {block} gives has a NaN or an infinity in calibration window {window}. Check the model with its own "
            "text, or try other calibration text."
        )


@contextmanager
def _nothing(blocks: range) -> Iterator[Callable[[], None]]:
    yield lambda: None


def read_windows(path: Path, network: Network) -> list[Tensor]:
    """Each window as a copy: a tensor in a mapped file lies at any address, on which last bits depend."""
    return [window.clone() for window in load_file(path, device=str(network.device))["windows"].split(1)]


def _write(path: Path, windows: list[Tensor]) -> None:
    stacked = {"windows": torch.cat(windows).cpu().contiguous()}
    replace_file(path, lambda target: save_file(stacked, target))
