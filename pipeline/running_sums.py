"""What a forward and a backward pass a window adds to the sums of curvature_sums.py, a part of the windows at a time.

The weights themselves take no gradient: a hook on each layer's output sees the layer's input x [tokens, in] and, later,
the output's gradient g [tokens, out]. So the memory is the model, the sums, and one weight gradient.
"""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.atomic import replace_file
from pipeline.curvature_sums import Sums
from pipeline.errors import NonFiniteError
from pipeline.model import Matrix, Model

SAVE_SHARE = 0.05  # of the time may go into saving the running sums


class RunningSums:
    """The sums over the windows of one part that are done.

    Attributes:
        sums: "<owner>.<sum>" -> running sum, see `owner_of`.
        num_done: windows done, those of earlier parts included.
    """

    def __init__(self, work: Path, sums: dict[str, Tensor], num_done: int) -> None:
        self.work, self.sums, self.num_done = work, sums, num_done
        self._save_seconds = 0.0
        self._saved_at = time.monotonic()

    @staticmethod
    def restore(work: Path, model: Model, kind: Sums, device: str, first: int) -> "RunningSums":
        """From the newest complete save, if it is of the part that starts at window `first`; else zeros."""
        saves = sorted(work.glob("sums-*.safetensors"))
        num_done = int(saves[-1].stem.removeprefix("sums-")) if saves else 0
        if num_done > first:
            sums = {name: tensor.to(device) for name, tensor in load_file(saves[-1]).items()}
            return RunningSums(work, sums, num_done)
        zeros: dict[str, Tensor] = {}
        for matrix in model.matrices:
            for name, shape in kind.shapes(matrix.shape).items():
                zeros.setdefault(f"{owner_of(matrix, kind)}.{name}", torch.zeros(shape, device=device))
        return RunningSums(work, zeros, first)

    def add(self, network: PreTrainedModel, tokens: Tensor, kind: Sums, seed: int) -> None:
        """One more window [tokens], inside of `collecting`. Raises NonFiniteError."""
        run_window(network, tokens, kind, self.num_done, seed)
        self.num_done += 1

    def clear(self) -> None:
        """Begin the next part."""
        for tensor in self.sums.values():
            tensor.zero_()

    def save_if_due(self) -> None:
        """Save, often enough that a kill loses little, and seldom enough that it takes little of the time."""
        if time.monotonic() - self._saved_at > self._save_seconds / SAVE_SHARE:
            self.save()

    def save(self) -> None:
        """Into `work`, in the place of earlier saves."""
        started = time.monotonic()
        target = self.work / f"sums-{self.num_done:08d}.safetensors"
        if not target.exists():
            replace_file(target, lambda path: save_file(self.sums, path))
            for older in self.work.glob("sums-*.safetensors"):
                if older != target:
                    older.unlink()
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - started


def run_window(network: PreTrainedModel, tokens: Tensor, sums: Sums, index: int, seed: int) -> None:
    """Forward and backward pass of one window [tokens]; hooks see what they see. Raises NonFiniteError."""
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
def collecting(network: nn.Module, model: Model, sums: Sums, running: RunningSums) -> Iterator[None]:
    """Hooks on every matrix's layer while the block runs."""
    seen: set[str] = set()
    with ExitStack() as stack:
        for matrix in model.matrices:
            owner = owner_of(matrix, sums)
            if owner in seen:
                continue
            seen.add(owner)
            held = {name: running.sums[f"{owner}.{name}"] for name in sums.shapes(matrix.shape)}
            hook = _layer_hook(matrix, sums, held, running)
            handle = network.get_submodule(matrix.module).register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


def _layer_hook(matrix: Matrix, sums: Sums, held: dict[str, Tensor], running: RunningSums):
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


def owner_of(matrix: Matrix, sums: Sums) -> str:
    """Whose the sums are: the matrix's, or its group's where they come from the input alone."""
    return matrix.group if sums.of_input_alone else matrix.name
