"""The sums of curvature_sums.py over a part of the windows, with as few blocks in memory as there is room for.

A hook on each layer's output sees the layer's input x [tokens, in] and, on the way back, the output's gradient g
[tokens, out]. No weight takes a gradient itself.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.curvature_sums import Sums
from pipeline.errors import NonFiniteError
from pipeline.layered import Network, matrices_of
from pipeline.layered_pass import forward, on_gradient, there_and_back
from pipeline.memory import give_back, is_shortage
from pipeline.model import Matrix, Model
from pipeline.summed_parts import owner_of, sum_bytes
from pipeline.tail import tail_of

Keep = Callable[[int, dict[str, Tensor]], None]


def collect_part(
    network: Network, model: Model, tokens: Tensor, first: int, kind: Sums, folder: Path, keep: Keep, *, seed: int
) -> Iterator[None]:
    """Collect the sums over `tokens` [windows, seq_len]; goes on from what an earlier call left in `folder`.

    Args:
        first: number of the first window.
        keep: given the sums of each layer. After a kill those of a layer may come once more, and are the same.
        seed: of the labels, where the metric draws them.
    Yields:
        For each block and window, once or twice: `num_steps` times.
    Raises:
        NonFiniteError: an activation, a gradient or the loss is NaN or infinite; names the layer and the window.
    """
    at_blocks = partial(_collecting, network, model, kind, first, keep)
    if kind.of_input_alone:
        return forward(network, tokens, folder, at_blocks, first=first, stop=network.num_blocks)
    tail = tail_of(network, tokens, partial(_sum_bytes, network, model, kind))
    label_seed = seed if kind.labels_are_drawn else None
    passes = partial(there_and_back, network, tokens, folder, at_blocks, first=first, label_seed=label_seed)
    return _with_a_shorter_tail(passes, tail)


def _with_a_shorter_tail(passes: Callable[..., Iterator[None]], tail: range) -> Iterator[None]:
    """The passes with that tail; where memory runs out, with the last block alone, from what is there already.

    Yields for each step once, whatever was in vain.
    """
    num_yielded = 0
    try:
        for _ in passes(tail=tail):
            num_yielded += 1
            yield
        return
    except Exception as error:
        if not is_shortage(error) or len(tail) == 1:
            raise
    give_back()  # here, where the failed attempt's tensors are gone
    yield from islice(passes(tail=tail[-1:]), num_yielded, None)


def num_steps(network: Network, kind: Sums, num_windows: int) -> int:
    """How often `collect_part` yields, all parts together."""
    return num_windows * network.num_blocks * (1 if kind.of_input_alone else 2)


def _sum_bytes(network: Network, model: Model, kind: Sums, block: int) -> int:
    return sum_bytes(matrices_of(network, model, [block]), kind)


@contextmanager
def _collecting(
    network: Network, model: Model, kind: Sums, first: int, keep: Keep, blocks: range
) -> Iterator[Callable[[], None]]:
    matrices = matrices_of(network, model, blocks)
    held = {
        f"{owner_of(matrix, kind)}.{name}": torch.zeros(shape, device=network.device)
        for matrix in matrices
        for name, shape in kind.shapes(matrix.shape).items()
    }
    with _collectors(network.network, matrices, kind, held, first) as window_is_done:
        yield window_is_done
    for layer in {matrix.layer for matrix in matrices}:
        owners = {owner_of(matrix, kind) for matrix in matrices if matrix.layer == layer}
        keep(layer, {name: tensor.cpu() for name, tensor in held.items() if name.rpartition(".")[0] in owners})


@contextmanager
def _collectors(
    network: nn.Module, matrices: Iterable[Matrix], kind: Sums, held: dict[str, Tensor], first: int
) -> Iterator[Callable[[], None]]:
    collectors: dict[str, _Collector] = {}

    def window_is_done() -> None:
        for each in collectors.values():
            each.window_is_done()

    with ExitStack() as stack:
        for matrix in matrices:
            owner = owner_of(matrix, kind)
            if owner in collectors:
                continue
            of_matrix = {name: held[f"{owner}.{name}"] for name in kind.shapes(matrix.shape)}
            collectors[owner] = each = _Collector(matrix, kind, of_matrix, first)
            layer = network.get_submodule(matrix.module)
            stack.callback(layer.register_forward_hook(each.on_forward).remove)
        yield window_is_done


class _Collector:
    """The hook on one layer. Calls of it in the same window are one sample: their gradients add up."""

    def __init__(self, matrix: Matrix, kind: Sums, held: dict[str, Tensor], first: int) -> None:
        self.matrix, self.kind, self.held, self.window = matrix, kind, held, first
        self.num_calls = 0
        self.of_calls: list[tuple[Tensor, Tensor]] = []  # where there are several

    def on_forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        x = inputs[0].detach().float().reshape(-1, self.matrix.shape[1])
        self._check(x, "input")
        if self.kind.of_input_alone:
            self.kind.add(self.held, x, x.new_empty(0))
            return None
        self.num_calls += 1
        return on_gradient(output, lambda gradient: self._add(x, gradient.float().reshape(-1, self.matrix.shape[0])))

    def window_is_done(self) -> None:
        if self.of_calls:
            x, g = zip(*self.of_calls, strict=True)
            self.kind.add(self.held, torch.cat(x), torch.cat(g))
        self.num_calls, self.of_calls = 0, []
        self.window += 1

    def _add(self, x: Tensor, g: Tensor) -> None:
        self._check(g, "gradient")
        if self.num_calls == 1:
            self.kind.add(self.held, x, g)
        else:
            self.of_calls.append((x, g))

    def _check(self, tensor: Tensor, what: str) -> None:
        if not math.isfinite(tensor.sum().item()):  # one pass; a NaN or an infinity survives a sum
            raise NonFiniteError(
                f"The {what} of {self.matrix.module} has a NaN or an infinity in calibration window {self.window}. "
                "Check the model with its own text, or try other calibration text."
            )
