"""How good a packed model is beside its original: figures on a text, and a sample of both."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.base_logits import BaseLogits, base_log_probs, cache_key
from pipeline.calibration import TokenWindows
from pipeline.errors import CalibrationError
from pipeline.evaluate import evaluate, sample_text
from pipeline.home import home
from pipeline.memory import give_back
from pipeline.model import Model
from pipeline.packed import load_packed, unpack
from pipeline.progress import Progress
from pipeline.unloaded import is_whole, original_network

SAMPLE_PROMPT = "Explain in two sentences why the sky is blue."
SAMPLE_TOKENS = 48


def original_logits(model: Model, tokens: Tensor, device: str, progress: Progress) -> BaseLogits:
    """What the original says to `tokens` [windows, seq_len], kept in the user's cache."""
    return base_log_probs(
        partial(original_network, model, device),
        tokens,
        cache_dir=home() / "logits",
        key=cache_key(model.digest, tokens, torch.float32),
        progress=progress,
    )


def measured(
    model: Model, folder: Path, windows: TokenWindows, device: str, keep: Path, progress: Progress
) -> dict[str, Any]:
    """The content of evaluation.json for the checkpoint in `folder`, see `ReportFacts`; `keep` as of `evaluate`."""
    original = original_logits(model, windows.tokens, device, progress)
    # in float32, as the original: half precision would add its own divergence, and may overflow
    network = load_packed(folder, device, torch.float32, trust_remote_code=model.trust_remote_code)
    report = evaluate(network, original, windows.tokens, keep=keep, progress=progress)
    original.release()
    samples: dict[str, str | None] = {"compressed": None, "original": None}
    if model.task.generates and is_whole(model, device):  # else all would be read, or dequantized, for every token
        unpack(network)
        samples["compressed"] = _sample("compressed", model, network, progress)
        del network
        give_back()
        samples["original"] = _sample("original", model, model.load(device=device), progress)
    return {
        "report": report.to_json(),
        "prompt": SAMPLE_PROMPT,
        "samples": samples,
        "text": windows.source,
        "text_commit": windows.revision,
    }


def _sample(label: str, model: Model, network: PreTrainedModel, progress: Progress) -> str | None:
    if not hasattr(network, "generate"):  # not all code that comes with models can
        return None
    try:
        for _ in progress.track([label], f"Sample text, {label}", total=1):
            return sample_text(network, model.tokenizer(), SAMPLE_PROMPT, SAMPLE_TOKENS)
    except CalibrationError as error:  # of a template that wants more than a user's turn
        progress.say(f"No sample text: {error}")
    return None
