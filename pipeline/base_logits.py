"""What the original model says about each evaluation window: computed once, kept on disk.

Every number passes through the same rounding (float16 log-probabilities, one window a forward), so
a report is the same to the last bit whether the windows come from the disk or from the model.

    cache_dir/<key>/window-00003.logprobs     SHA-256 of the rest (32 bytes), then safetensors:
        tokens            int64   [seq_len]           the window; a file of other tokens is not used
        log_probs         float16 [scored, vocab]     of the predicted token, rounded
        token_log_probs   float64 [scored]            of the token that came, before the rounding
        top_tokens        int64   [scored]            the likeliest token, before the rounding
    or, of an encoder (task.py):
        tokens            int64   [seq_len]
        features          float32 [seq_len, width]
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.atomic import replace_file
from pipeline.calibration import tokens_sha256
from pipeline.memory import give_back
from pipeline.progress import SILENT, Progress
from pipeline.scoring import answers_to, inference_only, require_windows
from pipeline.task import Predictions, task_of

SLICE_TOKENS = 64  # positions in float64 at a time: 25 MB for 49,152 vocabulary entries
LIMIT_BYTES = 8 * 2**30  # 24 windows of 512 tokens take 6.4 GB with a vocabulary of 262,144 tokens
DIGEST_BYTES = 32
ABANDONED_SECONDS = 3600.0


@dataclass(frozen=True, eq=False)
class BaseWindow:
    """The original's predictions in one window; all tensors on the CPU, shapes in the module's docstring."""

    tokens: Tensor
    log_probs: Tensor
    token_log_probs: Tensor
    top_tokens: Tensor


@dataclass(frozen=True, eq=False)
class BaseFeatures:
    """An original encoder's features of one window, alike."""

    tokens: Tensor
    features: Tensor


class BaseLogits:
    """The original's log-probabilities, window by window: from the cache where it holds them, else live.

    The original is loaded at the first window that must be computed, and kept until `release()`.
    """

    def __init__(self, load_model: Callable[[], PreTrainedModel], tokens: Tensor, folder: Path) -> None:
        self.tokens = require_windows(tokens)
        self._load_model = load_model
        self._folder = folder
        self._model: PreTrainedModel | None = None

    def window(self, index: int) -> BaseWindow | BaseFeatures:
        """The answer to window `index`; a missing or damaged file is computed anew, never trusted.

        Raises:
            NonFiniteError: the original's logits are not finite.
        """
        return self.cached(index) or self.compute(index)

    def cached(self, index: int) -> BaseWindow | BaseFeatures | None:
        """The answer on disk, or None where there is none that passes its checksum for these tokens."""
        window = read_window(self.path(index))
        if window is None or not torch.equal(window.tokens, self.tokens[index].cpu()):
            return None
        return window

    def compute(self, index: int) -> BaseWindow | BaseFeatures:
        """The answer from the model, one window in one forward so that no batch size changes a bit."""
        model = self.model()
        tokens = self.tokens[index]
        with inference_only(model):
            answer = answers_to(model, tokens[None], "the original model", first_window=index)[0]
        task, tokens = task_of(model.config), tokens.cpu()
        if not isinstance(task, Predictions):
            return BaseFeatures(tokens, answer.float().cpu())
        return summarize(tokens, answer, task.targets(tokens[None])[0])

    def model(self) -> PreTrainedModel:
        """The original, loaded at the first call."""
        if self._model is None:
            self._model = self._load_model()
        return self._model

    def release(self) -> None:
        """Let go of the original's memory; a later window that needs it loads it again."""
        self._model = None
        give_back()

    def path(self, index: int) -> Path:
        return self._folder / f"window-{index:05d}.logprobs"


def base_log_probs(
    base_model_loader: Callable[[], PreTrainedModel],
    tokens: Tensor,
    *,
    cache_dir: Path,
    key: str,
    limit_bytes: int = LIMIT_BYTES,
    progress: Progress = SILENT,
) -> BaseLogits:
    """Make the original's log-probabilities ready for `evaluate`, on disk where they fit.

    Finished windows survive a kill: each is one file, written under a temporary name, synced and
    renamed. Where the windows need more than `limit_bytes` or than the free disk space, nothing is
    written, `progress` says so, and `evaluate` runs the original beside the compressed model.
    Older windows under other keys are removed so that `cache_dir` as a whole keeps to the limit.

    Args:
        base_model_loader: called only if a window must be computed; let go once all are on disk.
        tokens: int64 [windows, seq_len].
        cache_dir: holds one folder a key.
        key: names the original's weights, the tokens and the dtype, as `cache_key` does.
        limit_bytes: the most that the cache may take.
    Raises:
        CalibrationError: `tokens` is not of that shape and dtype.
        NonFiniteError: the original's logits are not finite.
    """
    base = BaseLogits(base_model_loader, tokens, cache_dir / key)
    windows = progress.track(range(len(tokens)), "checking the original's cached predictions", len(tokens))
    missing = [index for index in windows if base.cached(index) is None]
    if not missing:
        return base
    base.model()  # outside the `try`: a model that cannot be opened is the caller's to know
    try:
        _fill(base, missing, cache_dir, limit_bytes, progress)
    except OSError as error:
        progress.say(
            f"The original's predictions cannot be kept in {cache_dir} ({error}): the original runs beside "
            "the compressed model instead."
        )
    return base


def cache_key(model_digest: str, tokens: Tensor, dtype: torch.dtype) -> str:
    """A folder name for one original, in one dtype, on one set of tokens."""
    parts = (model_digest, tokens_sha256(tokens), str(dtype))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def cache_bytes(config: PretrainedConfig, tokens: Tensor) -> int:
    """What the answers to `tokens` [windows, seq_len] take on disk; above LIMIT_BYTES none is kept there."""
    num_windows, seq_len = tokens.shape
    return num_windows * (seq_len - 1) * task_of(config).answer_bytes(config)


def summarize(tokens: Tensor, logits: Tensor, targets: Tensor) -> BaseWindow:
    """Round one window's logits [scored, vocab] for the cache; `targets` [scored] are the tokens that came.

    The log-likelihood and the top token are taken before the rounding: float16 has ties among likely tokens.
    """
    lowest = torch.finfo(torch.float16).min
    targets = targets.to(logits.device)
    log_probs, token_log_probs = [], []
    for rows, wanted in zip(logits.split(SLICE_TOKENS), targets.split(SLICE_TOKENS), strict=True):
        exact = torch.log_softmax(rows.double(), dim=-1)
        token_log_probs.append(exact.gather(-1, wanted[:, None])[:, 0])
        log_probs.append(exact.clamp_min(lowest).half().cpu())
    return BaseWindow(
        tokens=tokens,
        log_probs=torch.cat(log_probs),
        token_log_probs=torch.cat(token_log_probs).cpu(),
        top_tokens=logits.argmax(dim=-1).cpu(),
    )


def read_window(path: Path) -> BaseWindow | BaseFeatures | None:
    """The window in `path`, or None where the file is absent, cut off, changed, or of another layout."""
    try:
        with path.open("rb") as file:
            digest, payload = file.read(DIGEST_BYTES), file.read()
    except OSError:
        return None
    if hashlib.sha256(payload).digest() != digest:
        return None
    try:
        stored = load(payload)
        return BaseFeatures(**stored) if "features" in stored else BaseWindow(**stored)
    except (SafetensorError, TypeError):
        return None


def write_window(path: Path, window: BaseWindow | BaseFeatures) -> None:
    """Write `window` to `path` whole or not at all."""
    payload = save(dict(sorted(vars(window).items())))
    replace_file(path, lambda temporary: temporary.write_bytes(hashlib.sha256(payload).digest() + payload))


def _fill(base: BaseLogits, missing: list[int], cache_dir: Path, limit_bytes: int, progress: Progress) -> None:
    """Compute and keep the windows `missing`, unless all windows together are too large to keep."""
    num_windows, seq_len = base.tokens.shape
    all_bytes = cache_bytes(base.model().config, base.tokens)
    room = {
        "the cache's limit of": (all_bytes, limit_bytes),
        "the free disk space of": (len(missing) * all_bytes // num_windows, _free_bytes(cache_dir)),
    }
    for name, (needed_bytes, available_bytes) in room.items():
        if needed_bytes > available_bytes:
            progress.say(
                f"The original's predictions for {num_windows} windows of {seq_len} tokens need "
                f"{_mebibytes(needed_bytes)}, more than {name} {_mebibytes(available_bytes)}: nothing is "
                "cached, and the original runs beside the compressed model."
            )
            return
    base.path(0).parent.mkdir(parents=True, exist_ok=True)
    _make_room(cache_dir, keep=base.path(0).parent, limit_bytes=limit_bytes - all_bytes)
    for index in progress.track(missing, "the original's predictions", num_windows, num_windows - len(missing)):
        write_window(base.path(index), base.compute(index))
    base.release()


def _make_room(cache_dir: Path, *, keep: Path, limit_bytes: int) -> None:
    """Remove what killed runs left behind, and the oldest windows outside `keep` above `limit_bytes`."""
    for path in cache_dir.glob("*/.window-*.tmp"):
        if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
            path.unlink(missing_ok=True)
    others = [path for path in cache_dir.glob("*/window-*.logprobs") if path.parent != keep]
    others.sort(key=lambda path: (path.stat().st_mtime, path))
    excess_bytes = sum(path.stat().st_size for path in others) - limit_bytes
    for path in others:
        if excess_bytes <= 0:
            break
        excess_bytes -= path.stat().st_size
        path.unlink(missing_ok=True)


def _free_bytes(folder: Path) -> int:
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def _mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB"
