"""Evaluate a compressed folder beside its original, outside any run."""

import json
from pathlib import Path

import torch

from pipeline.base_logits import base_log_probs, cache_key
from pipeline.calibration import check_vocabulary, token_windows
from pipeline.eval_report import EvalReport
from pipeline.evaluate import evaluate
from pipeline.home import home
from pipeline.model import open_model
from pipeline.packed import load_packed
from pipeline.progress import SILENT, Progress


def evaluate_folder(
    folder: Path,
    base: str,
    *,
    base_revision: str | None,
    dataset: str | None,
    dataset_revision: str | None,
    num_windows: int,
    seq_len: int,
    device: str,
    progress: Progress = SILENT,
) -> EvalReport:
    """Perplexity, KL divergence and top-1 agreement on the first windows of a text.

    Raises:
        CheckpointError: `folder` is not a sound compressed checkpoint.
        ModelError, CalibrationError: see pipeline/errors.py.
    """
    network = load_packed(folder, device)
    original = open_model(base, revision=base_revision, progress=progress)
    made_from = json.loads((folder / "recipe.json").read_text()).get("model_sha256")
    if made_from != original.digest:
        progress.say(f"Note: {folder} was made from another model than {base} (its files differ).")
    windows = token_windows(
        dataset,
        original.tokenizer(),
        num_windows=num_windows,
        seq_len=seq_len,
        seed=None,
        revision=dataset_revision,
        split="test",
        default="evaluation",
    )
    check_vocabulary(windows, original.config.get_text_config().vocab_size)
    logits = base_log_probs(
        lambda: original.load(device=device),
        windows.tokens,
        cache_dir=home() / "logits",
        key=cache_key(original.digest, windows.tokens, torch.float32),
        progress=progress,
    )
    return evaluate(network, logits, windows.tokens, progress=progress)
