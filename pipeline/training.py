"""Training small parts of a network with everything else frozen: the loop that recovery and finetuning share.

AdamW moves float32 master copies. Each forward pass runs with their values as they will be stored, and the gradient is
taken as if that rounding were not there (straight-through), so training sees what the reader of the result will.

The last items are never trained on. Every few steps the loss is measured on them, and the values of the best
measurement are kept. A call in the folder of one that was killed goes on from its last save and ends with the same
result.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.adam import adam_step
from pipeline.errors import NonFiniteError
from pipeline.memory import free_bytes, give_back, is_shortage
from pipeline.progress import Progress
from pipeline.training_settings import Compute, TrainingSettings
from pipeline.training_state import Check, TrainingState
from quantizers import QuantizedLinear

EPOCHS_A_SEED = 2**20  # no two seeds share the order of an epoch
FREE_SHARE = 0.25  # of the free memory may go into activations; they are computed twice where that is too little
KEPT_A_FEATURE = 3  # numbers that autograd keeps for each input and output of a layer, with those of what lies between
AsStored = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def compute_of(device: str) -> Compute:
    """What to train in: bfloat16 where the device multiplies it in hardware (GPUs from 2020 on, AMX), else float32."""
    if device.startswith("cuda"):
        multiplies_it = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        multiplies_it = torch.cpu._is_amx_tile_supported()  # the one name for it in torch 2.11 too
    return "bfloat16" if multiplies_it else "float32"


def can_keep_activations(network: PreTrainedModel, num_tokens: int, *, reserved_bytes: int = 0) -> bool:
    """Whether what autograd keeps of a pass over so many tokens fits, without computing it twice.

    Args:
        network: with packed layers; about what these keep in float32 is counted.
        reserved_bytes: of the free memory, for something else.
    """
    layers = [module for module in network.modules() if isinstance(module, QuantizedLinear)]
    return activation_bytes(layers, num_tokens) < FREE_SHARE * (free_bytes(network.device) - reserved_bytes)


def activation_bytes(layers: list[QuantizedLinear], num_tokens: int) -> int:
    """About what autograd keeps of so many tokens without gradient checkpointing, in float32."""
    return 4 * KEPT_A_FEATURE * num_tokens * sum(layer.in_features + layer.out_features for layer in layers)


class Lesson(ABC):
    """What is learnt: items, each with a loss, and how the held-out ones are measured.

    Attributes:
        title: of the training, as progress shows it.
        item: what one item is called in messages.
    """

    title: ClassVar[str]
    item: ClassVar[str]

    @abstractmethod
    def __len__(self) -> int:
        """All items, held-out ones included."""

    @abstractmethod
    def losses(self, indices: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        """The mean loss of those items, in parts that sum to it, each with the items that it is of.

        A part's gradient is taken before the next part is asked for.
        """

    @abstractmethod
    def held_out_loss(self, indices: range) -> float:
        """The mean over items that are not trained on; called without gradients."""

    def save_memory(self) -> bool:
        """Go on in less memory, to the same result; False where there is no way to, or none that is left."""
        return False

    def rate_share(self, start_loss: float) -> float:
        """Of the learning rate, how much to take where `start_loss` was measured before any training."""
        return 1.0


@dataclass(frozen=True)
class Training:
    """One training, from wherever its state is.

    Attributes:
        live: the network's own parameters to train, by name.
        batch_size: items a step.
        patience: measurements without a gain after which it stops, in the second half of the steps, when the rate
            falls (at its height they go up and down); None for all steps.
        as_stored: float32 values by name -> the same values as they will be stored, in any float dtype; always the
            same for the same values.
        what_else: last sentence of the error where a loss is not finite.
    """

    live: dict[str, nn.Parameter]
    lesson: Lesson
    settings: TrainingSettings
    state: TrainingState
    batch_size: int
    patience: int | None
    as_stored: AsStored
    what_else: str

    def run(self, progress: Progress) -> None:
        """Take the steps that are missing.

        Raises:
            NonFiniteError: the loss or its gradient is NaN or infinite; the state has what came before.
        """
        state, settings = self.state, self.settings
        if state.checks:
            self._put_in()
        else:
            state.checks.append(Check(0, self._held_out_loss(), None))
        steps = range(state.step, settings.steps)
        for step in progress.track(steps, self.lesson.title, total=settings.steps, done=state.step):
            if self._has_stalled(step):
                break
            state.losses.append(self._twice_if_short(partial(self._add_gradients, step)))
            self._move(step)
            state.step = step + 1
            if state.step % settings.check_every == 0 or state.step == settings.steps:
                self._check()
            state.save_if_due()
        state.save()

    def check_last(self) -> None:
        """After a loss that was not finite: measure the values of the last good step, unless they were measured."""
        state = self.state
        if state.checks and state.step > state.checks[-1].step:
            with suppress(NonFiniteError):
                self._check()

    def _has_stalled(self, step: int) -> bool:
        is_late = step > self.settings.steps / 2
        return self.patience is not None and is_late and self.state.checks_without_gain >= self.patience

    def _add_gradients(self, step: int) -> float:
        """Mean loss of the step's items; its gradient is added to the live parameters."""
        total = 0.0
        for indices, loss in self.lesson.losses(self._items_of(step)):
            if not math.isfinite(loss.item()):
                which = f"{self.lesson.item} {', '.join(map(str, indices))}"
                raise self._diverged(f"The loss of {which} is {loss.item()}", step)
            loss.backward()
            total += loss.item()
        return total

    def _twice_if_short(self, run: Callable[[], float]) -> float:
        """What `run` gives; once more, in less memory, where that ran out."""
        try:
            return run()
        except Exception as error:
            if not is_shortage(error) or not self.lesson.save_memory():
                raise
        for parameter in self.live.values():
            parameter.grad = None
        give_back()  # here, where the failed attempt's tensors are gone
        return run()

    def _items_of(self, step: int) -> list[int]:
        """The step's items: each epoch has them all in an order of its own, so no state is needed to go on."""
        num_train = len(self.lesson) - self.settings.num_held_out(len(self.lesson))
        chosen = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(position, num_train)
            generator = torch.Generator().manual_seed(EPOCHS_A_SEED * self.settings.seed + epoch)
            chosen.append(int(torch.randperm(num_train, generator=generator)[place]))
        return chosen

    def _move(self, step: int) -> None:
        """One step of AdamW on the masters with the live parameters' gradients, which are used up."""
        norm = nn.utils.clip_grad_norm_(self.live.values(), self.settings.clip_norm).item()
        if not math.isfinite(norm):
            raise self._diverged(f"The norm of the gradient is {norm}", step)
        gradients = {name: parameter.grad for name, parameter in self.live.items() if parameter.grad is not None}
        state = self.state
        rate = self.settings.rate(step) * self.lesson.rate_share(state.checks[0].held_out_loss)
        adam_step(state.master, gradients, state.mean, state.square, num_before=step, learning_rate=rate)
        for parameter in self.live.values():
            parameter.grad = None
        self._put_in()

    @torch.no_grad()
    def _put_in(self) -> None:
        """Give the network the masters' values as they would be stored."""
        for name, value in self.as_stored(self.state.master).items():
            self.live[name].copy_(value)

    def _check(self) -> None:
        """Measure, and keep the values if they are the best so far."""
        state = self.state
        recent = state.losses[state.checks[-1].step :]
        loss = self._held_out_loss()
        if loss < min(check.held_out_loss for check in state.checks):
            state.best = {name: value.clone() for name, value in state.master.items()}
        state.checks.append(Check(state.step, loss, sum(recent) / len(recent)))

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        num_items = len(self.lesson)
        held_out = range(num_items - self.settings.num_held_out(num_items), num_items)
        loss = self._twice_if_short(partial(self.lesson.held_out_loss, held_out))
        if not math.isfinite(loss):
            raise self._diverged(f"The loss on what is held out is {loss}", self.state.step)
        return loss

    def _diverged(self, what: str, step: int) -> NonFiniteError:
        return NonFiniteError(
            f"{what} at step {step} of the {self.lesson.title.lower()}. If it is the first step, the packed model is "
            f"damaged: check it with `bitsmith evaluate`. Else the learning rate of {self.settings.learning_rate} is "
            f"too high: try a tenth of it. {self.what_else}".rstrip()
        )


def sha256_of(tensors: dict[str, nn.Parameter]) -> str:
    """Of names and values, in their order."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
