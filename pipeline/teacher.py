"""What the original says about each calibration window, cut down to its likeliest tokens: computed once, kept on disk.

    folder/window-00003.safetensors
        tokens       int64   [seq_len]          the window; a file of other tokens is not used
        top_tokens   int32   [scored, k]        the likeliest tokens, likeliest first
        log_probs    float16 [scored, k + 1]    theirs, and in the last column that of all other tokens together
        hidden       float16 [scored, width]    what the output head reads, if it was asked for
    or, of an encoder (task.py):
        tokens       int64   [seq_len]
        features     float32 [seq_len, width]

With k = 64 a token costs 386 bytes where all probabilities of 49,152 tokens would cost 98 KB.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.atomic import replace_file
from pipeline.progress import SILENT, Progress
from pipeline.scoring import answers_to, inference_only
from pipeline.task import Predictions, task_of

SLICE_TOKENS = 64  # positions in float64 at a time


@dataclass(frozen=True, eq=False)
class TeacherWindow:
    """The original's answer to one window; shapes in the module's docstring."""

    tokens: Tensor
    top_tokens: Tensor
    log_probs: Tensor
    hidden: Tensor | None


@dataclass(frozen=True, eq=False)
class TeacherFeatures:
    """An original encoder's answer, alike."""

    tokens: Tensor
    features: Tensor


@dataclass(frozen=True, eq=False)
class TeacherWindows:
    """The answers to all windows, one file each, made by `teacher_windows`.

    Attributes:
        file: where the file of that name (`window_file`) is.
        tokens: int64 [windows, seq_len].
    """

    file: Callable[[str], Path]
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def window(self, index: int, device: torch.device) -> TeacherWindow | TeacherFeatures:
        """The answer to window `index`."""
        stored = load_file(self.file(window_file(index)), device=str(device))
        if "features" in stored:
            return TeacherFeatures(**stored)
        return TeacherWindow(stored["tokens"], stored["top_tokens"], stored["log_probs"], stored.get("hidden"))


def teacher_windows(
    load_teacher: Callable[[], PreTrainedModel],
    tokens: Tensor,
    folder: Path,
    *,
    num_top: int,
    with_hidden: bool,
    progress: Progress = SILENT,
) -> TeacherWindows:
    """Make the original's answers ready in `folder`; finished windows are kept over kills.

    A folder is for one original and one `num_top`.

    Args:
        load_teacher: called only if a window must be computed, and its model let go afterwards.
        tokens: int64 [windows, seq_len].
        num_top: k; at most one less than the vocabulary is kept.
    Raises:
        NonFiniteError: the original's logits are not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [i for i, window in enumerate(tokens) if not _is_there(folder / window_file(i), window, with_hidden)]
    if missing:
        teacher = load_teacher()
        done = len(tokens) - len(missing)
        with inference_only(teacher):
            for index in progress.track(missing, "The original's predictions", total=len(tokens), done=done):
                answer = _ask(teacher, tokens[index], index, num_top, with_hidden)
                replace_file(folder / window_file(index), partial(save_file, answer))
    return TeacherWindows(folder.joinpath, tokens)


@contextmanager
def head_inputs(network: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A list to which every forward pass inside the block adds what the output head read, [windows, seq_len, width]."""
    seen: list[Tensor] = []
    head = network.get_output_embeddings()
    assert isinstance(head, nn.Module), "a model that predicts tokens has an output head"
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def coarsened(logits: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """The `num_top` likeliest tokens of each row, and their log-probabilities with all others' together at the end.

    Args:
        logits: [tokens, vocab], finite, any float dtype.
    Returns:
        int32 [tokens, k] and float16 [tokens, k + 1]; k is `num_top`, or vocab - 1 if that is less.
    """
    lowest = torch.finfo(torch.float16).min
    num_top = min(num_top, logits.shape[-1] - 1)
    top_tokens, log_probs = [], []
    for rows in logits.split(SLICE_TOKENS):
        exact = torch.log_softmax(rows.double(), dim=-1)
        top, indices = exact.topk(num_top, dim=-1)
        rest = exact.scatter(-1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
        top_tokens.append(indices.int())
        log_probs.append(torch.cat([top, rest], dim=-1).clamp_min(lowest).half())
    return torch.cat(top_tokens), torch.cat(log_probs)


def _ask(teacher: PreTrainedModel, tokens: Tensor, index: int, num_top: int, with_hidden: bool) -> dict[str, Tensor]:
    task = task_of(teacher.config)
    if not isinstance(task, Predictions):
        (features,) = answers_to(teacher, tokens[None], "the original model", first_window=index)
        return {"tokens": tokens.cpu(), "features": features.float().cpu().contiguous()}
    with head_inputs(teacher) as seen:
        (logits,) = answers_to(teacher, tokens[None], "the original model", first_window=index)
    top_tokens, log_probs = coarsened(logits, num_top)
    answer = {"tokens": tokens, "top_tokens": top_tokens, "log_probs": log_probs}
    if with_hidden:
        largest = torch.finfo(torch.float16).max
        answer["hidden"] = task.scored(seen[-1])[0].float().clamp(-largest, largest).half()
    return {name: tensor.cpu().contiguous() for name, tensor in answer.items()}


def _is_there(path: Path, tokens: Tensor, with_hidden: bool) -> bool:
    try:
        stored = load_file(path)
    except (OSError, SafetensorError):
        return False
    is_whole = "features" in stored or "hidden" in stored or not with_hidden
    return is_whole and torch.equal(stored["tokens"], tokens.cpu())


def window_file(index: int) -> str:
    """Name of the file with the answer to window `index`."""
    return f"window-{index:05d}.safetensors"
