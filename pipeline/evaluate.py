"""How far a compressed model is from its original: perplexity, KL divergence, top-1 agreement.

Both models read the same token windows; each scored token contributes to every figure, in float64
and in order. Standard errors treat the window, not the token, as the unit of sampling.
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.base_logits import SLICE_TOKENS, BaseLogits, BaseWindow
from pipeline.calibration import tokens_sha256
from pipeline.errors import CheckpointError
from pipeline.eval_report import Estimate, EvalReport
from pipeline.progress import SILENT, Progress
from pipeline.scoring import inference_only, next_token_logits, require_windows

MOST_WINDOWS = 4  # of a batch
MOST_LOGITS_BYTES = 2**29  # of a batch, in float32
ROUNDING = 1e-6  # nats: a divergence this little below zero is arithmetic, more would be a mistake


@dataclass(frozen=True, eq=False)
class TokenScores:
    """One number a scored token, float64 [tokens]; negative log-likelihoods (nll) and KL in nats."""

    nll: np.ndarray
    base_nll: np.ndarray
    kl_divergence: np.ndarray
    top1_agreement: np.ndarray


def evaluate(
    model: PreTrainedModel,
    base: BaseLogits,
    tokens: Tensor,
    *,
    batch_size: int | None = None,
    progress: Progress = SILENT,
) -> EvalReport:
    """Compare `model` with its original on `tokens`.

    KL(original || compressed) takes the original's log-probabilities as rounded to float16 and then
    renormalised, which moves a token's divergence by about 1e-6 nats. Perplexities and top-1
    agreement use unrounded numbers. Holds one batch of logits; `batch_size` changes the figures
    only as far as the model's own arithmetic depends on it.

    Args:
        model: any causal language model; its train or eval state is restored.
        base: the original's predictions for the same `tokens`, from `base_log_probs`.
        tokens: int64 [windows, seq_len].
        batch_size: windows at a time; None takes `batch_of`.
    Raises:
        CalibrationError: `tokens` has another shape or dtype.
        CheckpointError: the two models have different vocabularies.
        NonFiniteError: NaN or infinite logits; names the model and the window.
        ValueError: `base` was prepared for other tokens.
    """
    require_windows(tokens)
    if not torch.equal(base.tokens.cpu(), tokens.cpu()):
        raise ValueError("`base` was prepared for other tokens: call base_log_probs with the same ones.")
    scores: list[TokenScores] = []
    batch_size = batch_size or batch_of(tokens.shape[1], model.config.get_text_config().vocab_size)
    starts = range(0, len(tokens), batch_size)
    with inference_only(model):
        for start in progress.track(starts, "comparing with the original", len(starts)):
            scores += _score_batch(model, base, tokens[start : start + batch_size], start)
    return _report(scores, tokens)


def batch_of(seq_len: int, vocab_size: int) -> int:
    """Windows of which the packed weights are dequantized once: as many as their logits allow, four at most."""
    return max(1, min(MOST_WINDOWS, MOST_LOGITS_BYTES // (4 * seq_len * vocab_size)))


def score_window(logits: Tensor, base: BaseWindow) -> TokenScores:
    """Score one window, a slice of tokens at a time.

    Args:
        logits: the compressed model's, [seq_len - 1, vocab], finite, any float dtype and device.
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
    slices = (part.split(SLICE_TOKENS) for part in (logits, base.log_probs, base.tokens[1:]))
    for rows, base_rows, targets in zip(*slices, strict=True):
        log_q = torch.log_softmax(rows.double(), dim=-1)
        rounded = base_rows.to(rows.device).double()
        log_p = torch.log_softmax(rounded, dim=-1)  # probabilities that sum to 1 again
        nll.append(-log_q.gather(-1, targets.to(rows.device)[:, None])[:, 0])
        kl_divergence.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
    return TokenScores(
        nll=torch.cat(nll).cpu().numpy(),
        base_nll=-base.token_log_probs.numpy(),
        kl_divergence=_without_rounding(torch.cat(kl_divergence).cpu().numpy()),
        top1_agreement=(logits.argmax(dim=-1).cpu() == base.top_tokens).double().numpy(),
    )


def sample_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    chat: bool = True,
) -> str:
    """What `model` says after `prompt`, without it: greedy, so the same on every call.

    Args:
        chat: put the prompt into the tokenizer's chat template as the user's turn, if there is one.
    """
    if chat and tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        inputs: Any = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
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
    return str(tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True))


def _score_batch(model: PreTrainedModel, base: BaseLogits, batch: Tensor, start: int) -> list[TokenScores]:
    logits = next_token_logits(model, batch, "the compressed model", first_window=start)
    return [score_window(window, base.window(start + offset)) for offset, window in enumerate(logits)]


def _without_rounding(kl_divergence: np.ndarray) -> np.ndarray:
    tiny = (kl_divergence < 0) & (kl_divergence >= -ROUNDING)
    return np.where(tiny, 0.0, kl_divergence)


def _report(scores: list[TokenScores], tokens: Tensor) -> EvalReport:
    """Pool the windows' scores; every window has the same length, so the mean of means is the mean."""
    num_windows, seq_len = tokens.shape

    def estimate(name: str) -> Estimate:
        return Estimate.of_windows([float(getattr(window, name).mean()) for window in scores])

    kl_divergence = np.concatenate([window.kl_divergence for window in scores])
    return EvalReport(
        perplexity=estimate("nll").to_perplexity(),
        base_perplexity=estimate("base_nll").to_perplexity(),
        kl_divergence=estimate("kl_divergence"),
        kl_p99=float(np.quantile(kl_divergence, 0.99)),
        top1_agreement=estimate("top1_agreement"),
        num_tokens=num_windows * (seq_len - 1),
        num_windows=num_windows,
        seq_len=seq_len,
        tokens_sha256=tokens_sha256(tokens),
    )
