"""Run a causal language model over token windows, as a measurement: the model is left as it was.

A window of `seq_len` tokens scores `seq_len - 1` of them: position t predicts token t + 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import CalibrationError, NonFiniteError


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


def next_token_logits(model: PreTrainedModel, tokens: Tensor, name: str, *, first_window: int) -> Tensor:
    """The logits [windows, seq_len - 1, vocab] of one batch, in the model's dtype and on its device.

    Call inside `inference_only`.

    Args:
        tokens: int64 [windows, seq_len], one batch.
        name: what an error calls the model.
        first_window: the number of the batch's first window, for the same error.
    Raises:
        NonFiniteError: names the model, the window and the position.
    """
    logits = model(input_ids=tokens.to(model.device), use_cache=False).logits[:, :-1]
    for offset, window in enumerate(logits):
        finite = torch.isfinite(window.sum(dim=-1, dtype=torch.float32))  # which a NaN or an infinity survives
        if not finite.all():  # or the sum alone overflows
            finite = torch.isfinite(window).all(dim=-1)
        if not finite.all():
            position = int((~finite).nonzero()[0])
            raise NonFiniteError(
                f"The logits of {name} are not finite in window {first_window + offset}, first at token "
                f"{position}. Its weights or its arithmetic are broken: look for NaN or infinite weights, "
                "and use float32 or bfloat16 where it runs in float16."
            )
    return logits


def require_windows(tokens: Tensor) -> Tensor:
    """`tokens` unchanged where they are int64 [windows >= 1, seq_len >= 2], else CalibrationError."""
    if tokens.dtype == torch.int64 and tokens.dim() == 2 and tokens.shape[0] >= 1 and tokens.shape[1] >= 2:
        return tokens
    raise CalibrationError(
        f"The evaluation tokens are {tokens.dtype} {list(tokens.shape)}, but scoring needs int64 "
        "[windows, seq_len] with at least one window of at least two tokens. Give a longer text or a "
        "shorter --seq-len."
    )
