"""The coarse divergence is a divergence: never negative, zero at agreement, never above the one over all tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.recovery_loss import coarse_kl, hidden_error, mean_kl, next_token_loss
from pipeline.teacher import TeacherWindow, coarsened


def logits(seed: int, tokens: int = 5, vocab: int = 40, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed))


def exact_coarsened(rows: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """Without the rounding to float16."""
    log_probs = torch.log_softmax(rows.double(), dim=-1)
    top, indices = log_probs.topk(num_top, dim=-1)
    rest = log_probs.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    return indices, torch.cat([top, rest], -1)


def full_kl(packed: Tensor, original: Tensor) -> Tensor:
    log_p, log_q = (torch.log_softmax(rows.double(), dim=-1) for rows in (original, packed))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), num_top=st.integers(1, 39), spread=st.floats(0.1, 20))
def test_between_zero_and_the_full_divergence(seed: int, num_top: int, spread: float) -> None:
    original, packed = logits(seed, spread=spread), logits(seed + 1, spread=spread)
    found = coarse_kl(packed, *exact_coarsened(original, num_top))
    assert (found >= -1e-6).all()
    full = full_kl(packed, original).float()
    assert (found <= full * (1 + 1e-4) + 1e-5).all()


@pytest.mark.parametrize("seed", range(5))
def test_telling_all_but_one_apart_is_the_full_divergence(seed: int) -> None:
    original, packed = logits(seed), logits(seed + 100)
    found = coarse_kl(packed, *coarsened(original, 1000))
    torch.testing.assert_close(found, full_kl(packed, original).float(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("num_top", [1, 8, 39])
def test_zero_where_the_two_agree_even_by_a_shift(num_top: int) -> None:
    original = logits(3)
    found = coarse_kl(original + 7, *coarsened(original, num_top))
    assert found.abs().max() < 1e-5  # float16 log-probabilities


def test_certainty_on_either_side_stays_finite() -> None:
    sure, doubtful = torch.zeros(1, 40), logits(1, tokens=1)
    sure[0, 3] = 200.0
    for original, packed in ((sure, doubtful), (doubtful, sure), (sure, sure)):
        packed = packed.clone().requires_grad_()
        loss = coarse_kl(packed, *coarsened(original, 4)).sum()
        loss.backward()
        assert torch.isfinite(loss)
        assert packed.grad is not None
        assert torch.isfinite(packed.grad).all()


def test_the_gradient_passes_a_finite_difference_check() -> None:
    top_tokens, log_probs = coarsened(logits(1, tokens=2, vocab=9), 3)
    packed = logits(2, tokens=2, vocab=9)
    x = packed.clone().requires_grad_()
    coarse_kl(x, top_tokens, log_probs).sum().backward()
    assert x.grad is not None
    p = torch.log_softmax(log_probs.float(), -1).exp()
    q = torch.softmax(packed, -1)
    ratio = p[:, -1:] / (1 - q.gather(-1, top_tokens.long()).sum(-1, keepdim=True))
    expected = (q - q * ratio).scatter(-1, top_tokens.long(), q.gather(-1, top_tokens.long()) - p[:, :-1])
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_over_slices_are_those_of_autograd(dtype: torch.dtype) -> None:
    top_tokens, log_probs = coarsened(logits(1, tokens=300), 8)
    packed, upstream = logits(2, tokens=300).to(dtype), torch.randn(300)
    x, plain = packed.clone().requires_grad_(), packed.clone().float().requires_grad_()
    found = coarse_kl(x, top_tokens, log_probs)
    chosen = top_tokens.long()
    rest = plain.scatter(-1, chosen, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.log_softmax(torch.cat([plain.gather(-1, chosen), rest], -1), -1)
    log_p = torch.log_softmax(log_probs.float(), -1)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(found, x, upstream)
    (expected,) = torch.autograd.grad(wanted, plain, upstream)
    assert gradient.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(gradient.float(), expected, rtol=tolerance, atol=tolerance)


def window(tokens: int = 300, width: int = 6) -> TeacherWindow:
    top_tokens, log_probs = coarsened(logits(1, tokens=tokens), 8)
    return TeacherWindow(torch.arange(tokens + 1) % 40, top_tokens, log_probs, logits(5, tokens, width).half())


def test_a_long_window_is_the_mean_over_its_tokens() -> None:
    packed = logits(2, tokens=300).requires_grad_()
    whole = packed.detach().clone().requires_grad_()
    teacher = window()
    found = mean_kl(packed, teacher)
    expected = coarse_kl(whole, teacher.top_tokens, teacher.log_probs).mean()
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(packed.grad, whole.grad)


def test_hidden_error_is_relative() -> None:
    teacher = window()
    assert teacher.hidden is not None
    hidden = teacher.hidden.float()
    assert hidden_error(hidden, teacher) == 0
    torch.testing.assert_close(hidden_error(torch.zeros_like(hidden), teacher), torch.tensor(1.0))
    torch.testing.assert_close(hidden_error(1.1 * hidden, teacher), torch.tensor(0.01), rtol=1e-3, atol=0)


def test_next_token_loss_is_the_cross_entropy_of_what_came() -> None:
    packed = logits(2, tokens=300)
    expected = nn.functional.nll_loss(torch.log_softmax(packed, -1), window().tokens[1:])
    torch.testing.assert_close(next_token_loss(packed, window().tokens[1:]), expected)
