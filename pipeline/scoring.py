"""Run a model over token windows, as a measurement: the model is left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import CalibrationError, NonFiniteError
from pipeline.task import task_of


@contextmanager
def inference_only(model: PreTrainedModel) -> Iterator[None]:
    """No gradients and no dropout inside; afterwards each module trains or not as before."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


def answers_to(model: PreTrainedModel, tokens: Tensor, name: str, *, first_window: int) -> Tensor:
    """The answers [windows, scored, n] (task.py) to one batch, in the model's dtype and on its device.

    Call inside `inference_only`.

    Args:
        tokens: int64 [windows, seq_len], one batch.
        name: what an error calls the model.
        first_window: the number of the batch's first window, for the same error.
    Raises:
        NonFiniteError: names the model, the window and the position.
    """
    task = task_of(model.config)
    answers = task.answer(model, task.inputs(tokens.to(model.device)))
    for offset, window in enumerate(answers):
        finite = torch.isfinite(window.sum(dim=-1, dtype=torch.float32))  # which a NaN or an infinity survives
        if not finite.all():  # or the sum alone overflows
            finite = torch.isfinite(window).all(dim=-1)
        if not finite.all():
            position = int((~finite).nonzero()[0])
            raise NonFiniteError(
                f"What {name} answers is not finite in window {first_window + offset}, first at token "
                f"{position}. Its weights or its arithmetic are broken: look for NaN or infinite weights, "
                "and use float32 or bfloat16 where it runs in float16."
            )
    return answers


def require_windows(tokens: Tensor) -> Tensor:
    """`tokens` unchanged where they are int64 [windows >= 1, seq_len >= 2], else CalibrationError."""
    if tokens.dtype == torch.int64 and tokens.dim() == 2 and tokens.shape[0] >= 1 and tokens.shape[1] >= 2:
        return tokens
    raise CalibrationError(
        f"The evaluation tokens are {tokens.dtype} {list(tokens.shape)}, but scoring needs int64 "
        "[windows, seq_len] with at least one window of at least two tokens. Give a longer text or a "
        "shorter --seq-len."
    )
