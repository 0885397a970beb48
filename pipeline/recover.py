"""Recovery: train the small parts of a packed network until it answers like its original.

The codes stay; what is trained is stored anyway (pipeline/trainable.py), so the size does not change. The loop is that
of training.py, with the divergence from the original measured on the held-out windows; where no values were better
than the start, nothing is changed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.calibration import tokens_sha256
from pipeline.errors import CalibrationError
from pipeline.progress import SILENT, Progress
from pipeline.recovery_loss import hidden_error, mean_kl, next_token_loss
from pipeline.recovery_settings import RecoverySettings
from pipeline.task import Predictions, Task, task_of
from pipeline.teacher import TeacherFeatures, TeacherWindow, TeacherWindows, head_inputs
from pipeline.trainable import opened_for_training, save_memory
from pipeline.training import AsStored, Lesson, Training, can_keep_activations, sha256_of
from pipeline.training_state import Check, TrainingState
from quantizers import QuantizedLinear

STATE_FILE = "recovery.safetensors"
FULL_RATE_KL = 0.15  # nats a token on the held-out windows; from here on the learning rate is the settings' own


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
        return self.checks[0].held_out_loss

    @property
    def best_kl(self) -> float:
        """The same with `values` as they are stored; never above `start_kl`."""
        return min(check.held_out_loss for check in self.checks)


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
    can_keep = can_keep_activations(network, tokens.shape[1], reserved_bytes=copied)
    opened = opened_for_training(
        network, settings.train, dense_bytes=dense_bytes, dense_dtype=dense_dtype, keep_activations=can_keep
    )
    with opened as live:
        started_with = settings.model_dump(mode="json") | {"tokens": tokens_sha256(tokens), "start": sha256_of(live)}
        state = TrainingState.begin(work / STATE_FILE, started_with, dict(live), network.device)
        training = Training(
            live,
            _Recovery(network, teacher, settings),
            settings,
            state,
            batch_size=settings.batch_windows,
            patience=settings.patience,
            as_stored=as_stored,
            what_else="Nothing was changed.",
        )
        training.run(progress)
    return Recovered(state.best, tuple(state.checks), state.step)


@dataclass(frozen=True)
class _Recovery(Lesson):
    title: ClassVar[str] = "Recovery"
    item: ClassVar[str] = "calibration window"
    network: PreTrainedModel
    teacher: TeacherWindows
    settings: RecoverySettings

    def __len__(self) -> int:
        return len(self.teacher)

    @property
    def task(self) -> Task:
        return task_of(self.network.config)

    def losses(self, indices: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        """One window after the other."""
        for index in indices:
            yield [index], self.loss(index) / len(indices)

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

    def held_out_loss(self, indices: range) -> float:
        """The mean divergence from the original."""
        windows = (self.teacher.window(index, self.network.device) for index in indices)
        return sum(self.divergence(window).item() for window in windows) / len(indices)

    def save_memory(self) -> bool:
        """See pipeline/trainable.py."""
        return save_memory(self.network)

    def rate_share(self, start_loss: float) -> float:
        """Adam's steps do not shrink with the gradient, and what their jitter costs grows with the rate's square."""
        return min(1.0, math.sqrt(max(0.0, start_loss) / FULL_RATE_KL))

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
            return self.task.answer(self.network, self.task.inputs(tokens[None])).squeeze(0)


def require_windows(tokens: Tensor) -> None:
    """Raise CalibrationError unless there is a window to train on and one to measure on."""
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[0] < 2 or tokens.shape[1] < 2:
        raise CalibrationError(
            f"The calibration tokens are {tokens.dtype} {list(tokens.shape)}, but recovery needs int64 [windows, "
            "seq_len] with two windows of two tokens or more: one is held out to measure on. Give a longer text or "
            "more windows."
        )
