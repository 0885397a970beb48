"""How far the packed network is from the original on one window, as a loss.

    kl_weight * KL(original || packed)              over the likeliest tokens and one bucket for all others
    + hidden_weight * |h - H|^2 / |H|^2             of what the output head reads (RILQ, arXiv:2412.01129)
    + ce_weight * cross-entropy of the next token   (LREC in INT2.1, arXiv:2306.08162)

Merging the unlikely tokens into one bucket keeps the first term a divergence: it is never negative, zero where the
two agree, and never above the divergence over all tokens. An encoder has no head and no next token: of its features
the divergence alone counts (pipeline/task.py).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
    kl: Tensor = _CoarseKL.apply(logits, top_tokens.long(), torch.log_softmax(log_probs.float(), dim=-1))
    return kl


class _CoarseKL(torch.autograd.Function):
    """With q the packed network's probabilities and r those of all other tokens together, the gradient is

        q_j - p_j              of a token that is told apart
        q_j (1 - p_r / q_r)    of any other

    Autograd's own would pass over as many numbers as there are logits some ten times, most of them for new memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_tokens: Tensor, log_p: Tensor) -> Tensor:
        top = logits.gather(-1, top_tokens).float()
        pairs = zip(logits.split(SLICE_TOKENS), top_tokens.split(SLICE_TOKENS), strict=True)
        rest = torch.cat([rows.float().scatter(-1, told, -torch.inf).logsumexp(dim=-1) for rows, told in pairs])
        log_q = torch.log_softmax(torch.cat([top, rest[:, None]], dim=-1), dim=-1)
        ctx.save_for_backward(logits, top_tokens, log_p, log_q, rest)
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, top_tokens, log_p, log_q, rest = ctx.saved_tensors
        errors = (log_q.exp() - log_p.exp()) * upstream[:, None]
        gradient = torch.empty_like(logits)
        slices = (each.split(SLICE_TOKENS) for each in (gradient, logits, top_tokens, errors, rest))
        for out, rows, told, error, of_rest in zip(*slices, strict=True):
            others = (rows.float() - of_rest[:, None]).exp_().mul_(error[:, -1:])  # each one's share of q_r - p_r
            out.copy_(others.scatter_(-1, told, error[:, :-1]))
        return gradient, None, None


def mean_kl(logits: Tensor, teacher: TeacherWindow) -> Tensor:
    """The mean of `coarse_kl` over a window; `logits` is [scored, vocab]."""
    return coarse_kl(logits, teacher.top_tokens, teacher.log_probs).mean()


def hidden_error(hidden: Tensor, teacher: TeacherWindow) -> Tensor:
    """|h - H|^2 / |H|^2 over a window; `hidden` is [scored, width]."""
    assert teacher.hidden is not None
    wanted = teacher.hidden.float()
    return (hidden.float() - wanted).square().mean() / wanted.square().mean()


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens that came, `targets` [scored], in nats."""
    return nn.functional.cross_entropy(logits.float(), targets)
