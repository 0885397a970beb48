"""Recovery: train the small parts of a packed network until it answers like its original.

The codes stay; what is trained is stored anyway (pipeline/trainable.py), so the size does not change.
AdamW moves float32 master copies. Each forward pass runs with their values as they will be stored, and the gradient is
taken as if that rounding were not there (straight-through), so training sees what the reader of the checkpoint will.

The last windows are never trained on. Every few steps the divergence from the original is measured on them, the best
values are kept, and where none was better than the start, nothing is changed. In the second half of the steps, when
the rate falls, it stops after a few measurements without a gain; at its height they go up and down.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.adam import adam_step
from pipeline.calibration import tokens_sha256
from pipeline.errors import CalibrationError, NonFiniteError
from pipeline.memory import free_bytes
from pipeline.progress import SILENT, Progress
from pipeline.recovery_loss import hidden_error, mean_kl, next_token_loss
from pipeline.recovery_settings import Compute, RecoverySettings
from pipeline.recovery_state import Check, RecoveryState
from pipeline.task import Predictions, Task, task_of
from pipeline.teacher import TeacherFeatures, TeacherWindow, TeacherWindows, head_inputs
from pipeline.trainable import opened_for_training
from quantizers import QuantizedLinear

EPOCHS_A_SEED = 2**20  # no two seeds share the order of an epoch
FREE_SHARE = 0.25  # of the free memory may go into activations; a window's are computed twice where that is too little
KEPT_A_FEATURE = 3  # numbers that autograd keeps for each input and output of a layer, with those of what lies between
AsStored = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def compute_of(device: str) -> Compute:
    """What to train in: bfloat16 where the device multiplies it in hardware (a GPU, a CPU with AMX), else float32."""
    has_tiles = torch.cpu._is_amx_tile_supported()  # the one name for it in torch 2.11 too
    return "bfloat16" if device.startswith("cuda") or has_tiles else "float32"


def activation_bytes(layers: list[QuantizedLinear], seq_len: int) -> int:
    """About what autograd keeps of one window without gradient checkpointing, in float32."""
    return 4 * KEPT_A_FEATURE * seq_len * sum(layer.in_features + layer.out_features for layer in layers)


@dataclass(frozen=True, eq=False)
class Recovered:
    """Result of `recover`.

    Attributes:
        values: the best float32 values by the names of pipeline/trainable.py, before `as_stored`; empty where nothing
            was better than the start.
        checks: all measurements on the held-out windows, the first before any training.
        steps: that were taken.
    """

    values: dict[str, Tensor]
    checks: tuple[Check, ...]
    steps: int

    @property
    def start_kl(self) -> float:
        """On the held-out windows before any training, in nats a token."""
        return self.checks[0].kl_divergence

    @property
    def best_kl(self) -> float:
        """The same with `values` as they are stored; never above `start_kl`."""
        return min(check.kl_divergence for check in self.checks)


def recover(
    network: PreTrainedModel,
    teacher: TeacherWindows,
    settings: RecoverySettings,
    work: Path,
    *,
    as_stored: AsStored,
    dense_bytes: int = 0,
    progress: Progress = SILENT,
) -> Recovered:
    """Train `network` on all but the last of the windows, and say what should change.

    `network` is left as it was; recovered.py puts the result in. A call in the `work` of one that was killed goes on
    from its last save and ends with the same result.

    Args:
        network: a packed language model, on any device.
        teacher: the original's answers to two windows or more, with `settings.num_top` tokens told apart, and with what
            its head reads where `settings.hidden_weight` is not 0.
        work: an existing folder, kept by the caller over kills.
        as_stored: float32 values by name -> the same values as they will be stored, in any float dtype; always the
            same for the same values.
        dense_bytes: memory for dense copies of packed weights, which are then not dequantized for each product.
    Raises:
        CalibrationError: the tokens of `teacher` have another shape or dtype.
        NonFiniteError: the loss or its gradient is NaN or infinite.
        RecipeChangedError: `work` holds an unfinished recovery with other settings, tokens or starting values.
        RecipeError: the network has nothing of what `settings.train` names.
    """
    tokens = teacher.tokens
    require_windows(tokens)
    packed = [module for module in network.modules() if isinstance(module, QuantizedLinear)]
    dense_dtype = torch.bfloat16 if settings.compute == "bfloat16" else network.dtype
    copied = min(dense_bytes, dense_dtype.itemsize * sum(m.in_features * m.out_features for m in packed))
    can_keep = activation_bytes(packed, tokens.shape[1]) < FREE_SHARE * (free_bytes(network.device) - copied)
    opened = opened_for_training(
        network, settings.train, dense_bytes=dense_bytes, dense_dtype=dense_dtype, keep_activations=can_keep
    )
    with opened as live:
        started_with = settings.model_dump(mode="json") | {"tokens": tokens_sha256(tokens), "start": _sha256(live)}
        state = RecoveryState.begin(work, started_with, dict(live))
        _Training(network, live, teacher, settings, as_stored, state).run(progress)
    return Recovered(state.best, tuple(state.checks), state.step)


@dataclass(frozen=True)
class _Training:
    network: PreTrainedModel
    live: dict[str, nn.Parameter]
    teacher: TeacherWindows
    settings: RecoverySettings
    as_stored: AsStored
    state: RecoveryState

    @property
    def task(self) -> Task:
        return task_of(self.network.config)

    def run(self, progress: Progress) -> None:
        state, settings = self.state, self.settings
        if state.checks:
            self.put_in()
        else:
            state.checks.append(Check(0, self.held_out_kl(), None))
        steps = range(state.step, settings.steps)
        for step in progress.track(steps, "Recovery", total=settings.steps, done=state.step):
            if step > settings.steps / 2 and state.checks_without_gain >= settings.patience:
                break
            state.losses.append(self.add_gradients(step))
            self.move(step)
            state.step = step + 1
            if state.step % settings.check_every == 0 or state.step == settings.steps:
                self.check()
            state.save_if_due()
        state.save()

    def add_gradients(self, step: int) -> float:
        """Mean loss of the step's windows; its gradient is added to the live parameters."""
        total = 0.0
        for index in self.windows_of(step):
            loss = self.loss(index) / self.settings.batch_windows
            if not math.isfinite(loss.item()):
                raise self.diverged(f"The loss of calibration window {index} is {loss.item()}", step)
            loss.backward()
            total += loss.item()
        return total

    def windows_of(self, step: int) -> list[int]:
        """The step's windows: each epoch has them all in an order of its own, so no state is needed to go on."""
        num_train = len(self.teacher) - self.settings.num_held_out(len(self.teacher))
        batch = self.settings.batch_windows
        chosen = []
        for position in range(step * batch, (step + 1) * batch):
            epoch, place = divmod(position, num_train)
            generator = torch.Generator().manual_seed(EPOCHS_A_SEED * self.settings.seed + epoch)
            chosen.append(int(torch.randperm(num_train, generator=generator)[place]))
        return chosen

    def loss(self, index: int) -> Tensor:
        weights, task = self.settings, self.task
        window = self.teacher.window(index, self.network.device)
        if not isinstance(window, TeacherWindow):
            return weights.kl_weight * self.divergence(window)
        assert isinstance(task, Predictions)
        with head_inputs(self.network) as seen:
            logits = self.answer(window.tokens)
        loss = weights.kl_weight * mean_kl(logits, window)
        if weights.hidden_weight:
            loss = loss + weights.hidden_weight * hidden_error(task.scored(seen[-1])[0], window)
        if weights.ce_weight:
            loss = loss + weights.ce_weight * next_token_loss(logits, task.targets(window.tokens[None])[0])
        return loss

    def divergence(self, window: TeacherWindow | TeacherFeatures) -> Tensor:
        """From the original's answer to a window, in nats a token."""
        answer = self.answer(window.tokens)
        if isinstance(window, TeacherWindow):
            return mean_kl(answer, window)
        return self.task.divergences(window.features, answer.float()).mean().float()

    def answer(self, tokens: Tensor) -> Tensor:
        """The network's answer [scored, n] to a window."""
        is_low, device_type = self.settings.compute == "bfloat16", self.network.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=is_low):
            return self.task.answer(self.network, self.task.inputs(tokens[None]))[0]

    def move(self, step: int) -> None:
        """One step of AdamW on the masters with the live parameters' gradients, which are used up."""
        norm = nn.utils.clip_grad_norm_(self.live.values(), self.settings.clip_norm).item()
        if not math.isfinite(norm):
            raise self.diverged(f"The norm of the gradient is {norm}", step)
        gradients = {name: parameter.grad for name, parameter in self.live.items() if parameter.grad is not None}
        state, rate = self.state, self.settings.rate(step)
        adam_step(state.master, gradients, state.mean, state.square, num_before=step, learning_rate=rate)
        for parameter in self.live.values():
            parameter.grad = None
        self.put_in()

    @torch.no_grad()
    def put_in(self) -> None:
        """Give the network the masters' values as they would be stored."""
        for name, value in self.as_stored(self.state.master).items():
            self.live[name].copy_(value)

    def check(self) -> None:
        """Measure, and keep the values if they are the best so far."""
        state = self.state
        recent = state.losses[state.checks[-1].step :]
        kl = self.held_out_kl()
        if kl < min(check.kl_divergence for check in state.checks):
            state.best = {name: value.clone() for name, value in state.master.items()}
        state.checks.append(Check(state.step, kl, sum(recent) / len(recent)))

    @torch.no_grad()
    def held_out_kl(self) -> float:
        total = 0.0
        first = len(self.teacher) - self.settings.num_held_out(len(self.teacher))
        for index in range(first, len(self.teacher)):
            total += self.divergence(self.teacher.window(index, self.network.device)).item()
        kl = total / (len(self.teacher) - first)
        if not math.isfinite(kl):
            raise self.diverged(f"The divergence on the held-out windows is {kl}", self.state.step)
        return kl

    def diverged(self, what: str, step: int) -> NonFiniteError:
        return NonFiniteError(
            f"{what} at step {step} of the recovery. If it is the first step, the packed model is damaged: check it "
            f"with `bitsmith evaluate`. Else the learning rate of {self.settings.learning_rate} is too high: try a "
            "tenth of it. Nothing was changed."
        )


def require_windows(tokens: Tensor) -> None:
    """Raise CalibrationError unless there is a window to train on and one to measure on."""
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[0] < 2 or tokens.shape[1] < 2:
        raise CalibrationError(
            f"The calibration tokens are {tokens.dtype} {list(tokens.shape)}, but recovery needs int64 [windows, "
            "seq_len] with two windows of two tokens or more: one is held out to measure on. Give a longer text or "
            "more windows."
        )


def _sha256(tensors: dict[str, nn.Parameter]) -> str:
    """Of names and values, in their order."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
