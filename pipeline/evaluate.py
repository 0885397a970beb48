"""How far a compressed model is from its original: perplexity, KL divergence, top-1 agreement; of encoders, features.

Both models read the same token windows; each scored token contributes to every figure, in float64
and in order. Standard errors treat the window, not the token, as the unit of sampling.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.atomic import replace_file
from pipeline.base_logits import SLICE_TOKENS, BaseFeatures, BaseLogits, BaseWindow
from pipeline.calibration import rendered, tokens_sha256
from pipeline.errors import CheckpointError
from pipeline.eval_report import Estimate, EvalReport
from pipeline.memory import give_back, is_shortage
from pipeline.progress import SILENT, Progress
from pipeline.scoring import answers_to, inference_only, require_windows
from pipeline.task import Features, Predictions, task_of

MOST_WINDOWS = 4  # of a batch
MOST_LOGITS_BYTES = 2**29  # of a batch, in float32
# of one window, float64 [scored] by name: nll and base_nll (negative log-likelihoods, nats), kl_divergence (nats) and
# top1_agreement; or kl_divergence and cosine_similarity
TokenScores = dict[str, np.ndarray]
ROUNDING = 1e-6  # nats: a divergence this little below zero is arithmetic, more would be a mistake


def evaluate(
    model: PreTrainedModel,
    base: BaseLogits,
    tokens: Tensor,
    *,
    batch_size: int | None = None,
    keep: Path | None = None,
    progress: Progress = SILENT,
) -> EvalReport:
    """Compare `model` with its original on `tokens`.

    KL(original || compressed) takes the original's log-probabilities as rounded to float16 and then
    renormalised, which moves a token's divergence by about 1e-6 nats. Perplexities and top-1
    agreement use unrounded numbers. Holds one batch of logits; `batch_size` changes the figures
    only as far as the model's own arithmetic depends on it.

    Args:
        model: any language model; its train or eval state is restored.
        base: the original's predictions for the same `tokens`, from `base_log_probs`.
        tokens: int64 [windows, seq_len].
        batch_size: windows at a time; None takes `batch_of`.
        keep: folder for the scores of each window, from which a call after a kill goes on.
    Raises:
        CalibrationError: `tokens` has another shape or dtype.
        CheckpointError: the two models have different vocabularies.
        NonFiniteError: NaN or infinite logits; names the model and the window.
        ValueError: `base` was prepared for other tokens.
    """
    require_windows(tokens)
    if not torch.equal(base.tokens.cpu(), tokens.cpu()):
        raise ValueError("`base` was prepared for other tokens: call base_log_probs with the same ones.")
    batch_size = batch_size or batch_of(tokens.shape[1], task_of(model.config).answer_width(model.config))
    with inference_only(model):
        known = _kept(keep) if keep else []
        del known[len(known) // batch_size * batch_size :]  # a batch's windows depend on one another in the last bit
        found = _scores(model, base, tokens, batch_size, len(known))
        for score in progress.track(found, "comparing with the original", len(tokens), len(known)):
            if keep:
                _keep(score, keep / f"scores-{len(known):05d}.npz")
            known.append(score)
    return _report(known, tokens)


def batch_of(seq_len: int, answer_width: int) -> int:
    """Windows of which the packed weights are dequantized once: as many as their answers allow, four at most."""
    return max(1, min(MOST_WINDOWS, MOST_LOGITS_BYTES // (4 * seq_len * answer_width)))


def score_window(logits: Tensor, base: BaseWindow, targets: Tensor) -> TokenScores:
    """Score one window, a slice of tokens at a time.

    Args:
        logits: the compressed model's, [scored, vocab], finite, any float dtype and device.
        targets: the tokens that came, int64 [scored].
    Raises:
        CheckpointError: the vocabularies differ.
    """
    vocab_size, base_vocab_size = logits.shape[-1], base.log_probs.shape[-1]
    if vocab_size != base_vocab_size:
        raise CheckpointError(
            f"The compressed model predicts {vocab_size} tokens and the original {base_vocab_size}: their "
            "vocabularies differ, so their predictions cannot be compared. Name the model that this "
            "checkpoint was made from as the base."
        )
    nll, kl_divergence = [], []
    slices = (part.split(SLICE_TOKENS) for part in (logits, base.log_probs, targets))
    for rows, base_rows, wanted in zip(*slices, strict=True):
        log_q = torch.log_softmax(rows.double(), dim=-1)
        rounded = base_rows.to(rows.device).double()
        log_p = torch.log_softmax(rounded, dim=-1)  # probabilities that sum to 1 again
        nll.append(-log_q.gather(-1, wanted.to(rows.device)[:, None])[:, 0])
        kl_divergence.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
    return {
        "nll": torch.cat(nll).cpu().numpy(),
        "base_nll": -base.token_log_probs.numpy(),
        "kl_divergence": _without_rounding(torch.cat(kl_divergence).cpu().numpy()),
        "top1_agreement": (logits.argmax(dim=-1).cpu() == base.top_tokens).double().numpy(),
    }


def score_features(features: Tensor, base: BaseFeatures, task: Features) -> TokenScores:
    """Score one window of an encoder, whose features are [scored, width]."""
    before, after = base.features, features.float().cpu()
    if before.shape != after.shape:
        raise CheckpointError(
            f"The compressed model has {after.shape[-1]} features a token and the original {before.shape[-1]}, so they "
            "cannot be compared. Name the model that this checkpoint was made from as the base."
        )
    return {
        "kl_divergence": task.divergences(before, after).numpy(),
        "cosine_similarity": torch.cosine_similarity(before.double(), after.double(), dim=-1).numpy(),
    }


def sample_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    """What `model` says after `prompt`, without it: greedy, so the same on every call.

    The prompt is the user's turn in the tokenizer's chat template, if there is one.

    Raises:
        CalibrationError: the template refuses it.
    """
    has_template = bool(tokenizer.chat_template)
    if has_template:
        prompt = rendered([{"role": "user", "content": prompt}], tokenizer, asks=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not has_template)
    input_ids = inputs["input_ids"].to(model.device)
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with inference_only(model):
        output = cast(Any, model).generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad_token_id,
        )
    num_read = 0 if model.config.is_encoder_decoder else input_ids.shape[1]
    return str(tokenizer.decode(output[0, num_read:], skip_special_tokens=True))


def _keep(scores: TokenScores, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    replace_file(path, lambda temporary: _write(scores, temporary))


def _write(scores: TokenScores, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **scores)  # type: ignore[arg-type]


def _kept(folder: Path) -> list[TokenScores]:
    """Of the first windows."""
    found: list[TokenScores] = []
    while (path := folder / f"scores-{len(found):05d}.npz").exists():
        with np.load(path) as stored:
            found.append(dict(stored))
    return found


def _scores(
    model: PreTrainedModel, base: BaseLogits, tokens: Tensor, batch_size: int, start: int
) -> Iterator[TokenScores]:
    """Of each window from `start` on, a batch at once; one by one from where memory runs out."""
    while start < len(tokens):
        batch = tokens[start : start + batch_size]
        try:
            found = _score_batch(model, base, batch, start)
        except Exception as error:
            if not is_shortage(error) or len(batch) == 1:
                raise
            found, batch_size = [], 1
        if not found:
            give_back()  # here, where the failed attempt's tensors are gone
        yield from found
        start += len(found)


def _score_batch(model: PreTrainedModel, base: BaseLogits, batch: Tensor, start: int) -> list[TokenScores]:
    answers = answers_to(model, batch, "the compressed model", first_window=start)
    task, scores = task_of(model.config), []
    for offset, (tokens, answer) in enumerate(zip(batch.cpu(), answers, strict=True)):
        window = base.window(start + offset)
        if isinstance(task, Predictions) and isinstance(window, BaseWindow):
            scores.append(score_window(answer, window, task.targets(tokens[None])[0]))
        elif isinstance(task, Features) and isinstance(window, BaseFeatures):
            scores.append(score_features(answer, window, task))
        else:
            raise CheckpointError(
                "One of the compressed model and its original is an encoder and the other is not, so their answers "
                "cannot be compared. Name the model that this checkpoint was made from as the base."
            )
    return scores


def _without_rounding(kl_divergence: np.ndarray) -> np.ndarray:
    tiny = (kl_divergence < 0) & (kl_divergence >= -ROUNDING)
    return np.where(tiny, 0.0, kl_divergence)


def _report(scores: list[TokenScores], tokens: Tensor) -> EvalReport:
    """Pool the windows' scores; every window has the same length, so the mean of means is the mean."""
    num_windows, seq_len = tokens.shape

    def estimate(name: str) -> Estimate:
        return Estimate.of_windows([float(window[name].mean()) for window in scores])

    kl_divergence = np.concatenate([window["kl_divergence"] for window in scores])
    common: dict[str, Any] = {
        "kl_divergence": estimate("kl_divergence"),
        "kl_p99": float(np.quantile(kl_divergence, 0.99)),
        "num_tokens": len(kl_divergence),
        "num_windows": num_windows,
        "seq_len": seq_len,
        "tokens_sha256": tokens_sha256(tokens),
    }
    if "cosine_similarity" in scores[0]:
        return EvalReport(**common, cosine_similarity=estimate("cosine_similarity"))
    return EvalReport(
        **common,
        perplexity=estimate("nll").to_perplexity(),
        base_perplexity=estimate("base_nll").to_perplexity(),
        top1_agreement=estimate("top1_agreement"),
    )
