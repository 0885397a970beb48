"""How far the packed network is from the original on one window, as a loss.

    kl_weight * KL(original || packed)              over the likeliest tokens and one bucket for all others
    + hidden_weight * |h - H|^2 / |H|^2             of what the output head reads (RILQ, arXiv:2412.01129)
    + ce_weight * cross-entropy of the next token   (LREC in INT2.1, arXiv:2306.08162)

Merging the unlikely tokens into one bucket keeps the first term a divergence: it is never negative, zero where the
two agree, and never above the divergence over all tokens. An encoder has no head and no next token: of its features
the divergence alone counts (pipeline/task.py).
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.teacher import TeacherWindow

SLICE_TOKENS = 128  # positions whose probabilities over the whole vocabulary are held in float32 at a time


def coarse_kl(logits: Tensor, top_tokens: Tensor, log_probs: Tensor) -> Tensor:
    """KL(original || packed) of each token, in nats.

    Args:
        logits: the packed network's, [tokens, vocab], any float dtype.
        top_tokens: [tokens, k], of the original, with k below vocab.
        log_probs: [tokens, k + 1], as `teacher.coarsened` gives them; renormalised here after their rounding.
    Returns:
        float32 [tokens].
    """
    logits, top_tokens = logits.float(), top_tokens.long()
    top = logits.gather(-1, top_tokens)
    rest = logits.scatter(-1, top_tokens, -torch.inf).logsumexp(dim=-1, keepdim=True)
    log_q = torch.log_softmax(torch.cat([top, rest], dim=-1), dim=-1)
    log_p = torch.log_softmax(log_probs.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def mean_kl(logits: Tensor, teacher: TeacherWindow) -> Tensor:
    """The mean of `coarse_kl` over a window.

    `logits` is [scored, vocab]. Each slice is computed again for its gradient.
    """
    slices = (part.split(SLICE_TOKENS) for part in (logits, teacher.top_tokens, teacher.log_probs))
    parts = [checkpoint(coarse_kl, *rows, use_reentrant=False) for rows in zip(*slices, strict=True)]
    return torch.cat(parts).mean()


def hidden_error(hidden: Tensor, teacher: TeacherWindow) -> Tensor:
    """|h - H|^2 / |H|^2 over a window; `hidden` is [scored, width]."""
    assert teacher.hidden is not None
    wanted = teacher.hidden.float()
    return (hidden.float() - wanted).square().mean() / wanted.square().mean()


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens that came, `targets` [scored], in nats."""
    return nn.functional.cross_entropy(logits.float(), targets)
