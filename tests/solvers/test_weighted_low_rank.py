"""Elementwise-weighted low rank: every method against the closed forms, gradient descent, and each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from solvers.low_rank import Factors, truncated_svd, whitened_svd
from solvers.weighted_low_rank import METHODS, weighted_low_rank

METHOD_NAMES = sorted(METHODS)
MONOTONE = ["als", "em"]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(rows: int = 64, columns: int = 48, *, log_std: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A residual with a decaying spectrum and log-normal weights, whose unit is far from 1."""
    residual = torch.randn(rows, columns, generator=rng(seed)) @ torch.diag((torch.arange(columns) + 1.0) ** -0.5)
    return residual, 1e-6 * torch.exp(log_std * torch.randn(rows, columns, generator=rng(seed + 1)))


def loss(residual: Tensor, weights: Tensor, factors: Factors) -> float:
    return float((weights.double() * (residual.double() - factors.out.double() @ factors.into.double()) ** 2).sum())


def zeros(shape: torch.Size, rank: int) -> Factors:
    return Factors(torch.zeros(shape[0], rank), torch.zeros(rank, shape[1]))


def closed_form(residual: Tensor, weights: Tensor, rank: int) -> Factors:
    return whitened_svd(residual, weights.mean(dim=1).sqrt(), weights.mean(dim=0).sqrt(), rank)


@pytest.mark.parametrize("method", ["em", "nesterov", "anderson"])
def test_equal_weights_reproduce_the_truncated_svd_in_one_step(method: str) -> None:
    residual, _ = problem()
    weights = torch.full_like(residual, 3.0)
    fit = weighted_low_rank(residual, weights, 5, method=method, init=zeros(residual.shape, 5), max_iterations=1)
    torch.testing.assert_close(fit.factors.product(), truncated_svd(residual, 5).product(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_equal_and_separable_weights_are_solved_by_the_start(method: str) -> None:
    residual, _ = problem()
    rows, columns = torch.rand(64, generator=rng(3)) + 0.1, torch.rand(48, generator=rng(4)) + 0.1
    for weights in (torch.ones_like(residual), rows[:, None] * columns):
        fit = weighted_low_rank(residual, weights, 5, method=method)
        assert fit.converged
        assert fit.loss == pytest.approx(fit.losses[0], rel=1e-4)
        expected = whitened_svd(residual, weights.mean(dim=1).sqrt(), weights.mean(dim=0).sqrt(), 5)
        torch.testing.assert_close(fit.factors.product(), expected.product(), rtol=0, atol=2e-2)


@pytest.mark.parametrize(("log_std", "tolerance"), [(0.5, 1e-4), (1.0, 1e-2)])
def test_all_methods_reach_the_same_loss(log_std: float, tolerance: float) -> None:
    residual, weights = problem(log_std=log_std)  # wilder weights have several nearly equal local optima
    losses = {
        method: weighted_low_rank(residual, weights, 5, method=method, max_iterations=1500, tolerance=1e-8).loss
        for method in METHODS
    }
    assert losses == pytest.approx(dict.fromkeys(METHODS, min(losses.values())), rel=tolerance)


def test_gradient_descent_from_the_answer_finds_nothing_better() -> None:
    residual, weights = problem(20, 15)
    fit = weighted_low_rank(residual, weights, 3, max_iterations=2000, tolerance=1e-9)
    out = fit.factors.out.double().requires_grad_()
    into = fit.factors.into.double().requires_grad_()
    optimizer = torch.optim.LBFGS([out, into], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = 1e6 * (weights.double() * (residual.double() - out @ into) ** 2).sum()
        value.backward()
        return value

    optimizer.step(closure)
    assert 1e-6 * closure().item() == pytest.approx(fit.loss, rel=1e-4)


@pytest.mark.parametrize("log_std", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_never_worse_than_the_closed_form_and_clearly_better_where_weights_vary(method: str, log_std: float) -> None:
    residual, weights = problem(log_std=log_std)
    before = loss(residual, weights, closed_form(residual, weights, 5))
    fit = weighted_low_rank(residual, weights, 5, method=method)
    after = loss(residual, weights, fit.factors)
    assert fit.losses[0] == pytest.approx(before, rel=1e-3)
    assert after == pytest.approx(fit.loss, rel=1e-3)
    assert after < before * (0.99 if log_std < 1 else 0.9)


@given(st.sampled_from(MONOTONE), st.integers(2, 20), st.integers(2, 20), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=40)
def test_als_and_em_never_raise_the_loss(method: str, rows: int, columns: int, rank: int, seed: int) -> None:
    residual = torch.randn(rows, columns, generator=rng(seed))
    weights = torch.exp(2 * torch.randn(rows, columns, generator=rng(seed + 1)))
    weights[torch.rand(rows, columns, generator=rng(seed + 2)) < 0.2] = 0
    weights[0, 0] = 1
    fit = weighted_low_rank(residual, weights, min(rank, rows, columns), method=method, max_iterations=15)
    noise = 1e-6 * float((weights * residual**2).sum())
    assert all(after <= before + noise for before, after in zip(fit.losses, fit.losses[1:], strict=False))


def test_one_als_sweep_is_the_exact_row_and_column_regression() -> None:
    residual, weights = problem(12, 9)
    start = closed_form(residual, weights, 3)
    fit = weighted_low_rank(residual, weights, 3, init=start, max_iterations=1)

    def regressed(target: Tensor, weight: Tensor, into: Tensor) -> Tensor:
        rows = [
            torch.linalg.lstsq((into * w.sqrt()).T, (t * w.sqrt())[:, None]).solution[:, 0]
            for t, w in zip(target, weight, strict=True)
        ]
        return torch.stack(rows)

    residual, weights = residual.double(), 1e6 * weights.double()
    out = regressed(residual, weights, start.into.double())
    into = regressed(residual.T, weights.T, out.T).T
    torch.testing.assert_close(fit.factors.product().double(), out @ into, rtol=0, atol=1e-3)


@pytest.mark.parametrize("faster", ["nesterov", "anderson"])
def test_the_accelerations_need_fewer_svds_than_em(faster: str) -> None:
    residual, weights = problem()
    goal = 1.001 * weighted_low_rank(residual, weights, 5, max_iterations=2000, tolerance=1e-8).loss

    def svds(method: str) -> int:
        fit = weighted_low_rank(residual, weights, 5, method=method, max_iterations=2000, tolerance=1e-8)
        return next(k for k, value in enumerate(fit.losses) if value <= goal)

    assert svds(faster) < 0.6 * svds("em")


def test_scaling_rows_and_columns_makes_badly_scaled_problems_easy() -> None:
    residual, weights = problem(log_std=0.3)
    rows, columns = 10 ** torch.randn(64, generator=rng(8)), 10 ** torch.randn(48, generator=rng(9))
    scaled = weights * rows[:, None] ** 2 * columns**2
    fit = weighted_low_rank(residual / rows[:, None] / columns, scaled, 5, method="em", max_iterations=200)
    best = weighted_low_rank(residual, weights, 5, max_iterations=1000, tolerance=1e-8).loss
    assert fit.loss == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_zero_one_weights_complete_a_low_rank_matrix(method: str) -> None:
    matrix = torch.randn(40, 3, generator=rng(0)) @ torch.randn(3, 30, generator=rng(1))
    seen = (torch.rand(40, 30, generator=rng(2)) < 0.6).float()
    fit = weighted_low_rank(matrix, seen, 3, method=method, max_iterations=1000, tolerance=1e-7)
    unseen_error = float(((1 - seen) * (matrix - fit.factors.product())).norm() / ((1 - seen) * matrix).norm())
    assert unseen_error < 0.02


def test_rows_and_columns_without_weight_are_left_alone() -> None:
    residual, weights = problem(12, 10)
    weights[3], weights[:, 4] = 0, 0
    for method in METHODS:
        fit = weighted_low_rank(residual, weights, 3, method=method)
        assert torch.isfinite(fit.factors.product()).all()
        assert loss(residual, weights, fit.factors) == pytest.approx(fit.loss, rel=1e-3)
        assert fit.loss <= fit.losses[0]


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_residual_of_zeros_and_full_rank(method: str) -> None:
    _, weights = problem(8, 6)
    nothing = weighted_low_rank(torch.zeros(8, 6), weights, 2, method=method)
    assert nothing.converged
    assert nothing.loss == 0
    assert torch.equal(nothing.factors.product(), torch.zeros(8, 6))
    residual, _ = problem(8, 6)
    full = weighted_low_rank(residual, weights, 6, method=method)
    assert full.loss < 1e-8 * loss(residual, weights, zeros(residual.shape, 6))


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_same_input_same_factors(method: str) -> None:
    residual, weights = problem(100, 90)
    before = residual.clone(), weights.clone()
    first, second = (weighted_low_rank(residual, weights, 4, method=method, max_iterations=5) for _ in range(2))
    assert torch.equal(first.factors.out, second.factors.out)
    assert torch.equal(first.factors.into, second.factors.into)
    assert torch.equal(residual, before[0])
    assert torch.equal(weights, before[1])


def test_bad_input_is_refused() -> None:
    residual, weights = torch.ones(4, 6), torch.ones(4, 6)
    for rank in (0, 5):
        with pytest.raises(ValueError, match=rf"rank {rank} .*it must be 1 to 4"):
            weighted_low_rank(residual, weights, rank)
    for bad in (-1.0, float("nan"), float("inf")):
        weights_with = weights.clone()
        weights_with[1, 2] = bad
        with pytest.raises(ValueError, match="finite, at least 0, and not all 0"):
            weighted_low_rank(residual, weights_with, 2)
    with pytest.raises(ValueError, match="not all 0"):
        weighted_low_rank(residual, 0 * weights, 2)
    with pytest.raises(ValueError, match="'sgd'; it must be one of als, em"):
        weighted_low_rank(residual, weights, 2, method="sgd")
    with pytest.raises(ValueError, match=r"rank 2 asks for \(4, 2\) and \(2, 6\)"):
        weighted_low_rank(residual, weights, 2, init=zeros(residual.shape, 3))
    with pytest.raises(ValueError, match="max_iterations is 0"):
        weighted_low_rank(residual, weights, 2, max_iterations=0)


@pytest.mark.parametrize("method", ["als", "nesterov", "anderson"])
def test_the_unit_of_the_weights_changes_nothing(method: str) -> None:
    """Squares of what is as small as a Fisher diagonal may be are below what float32 holds."""
    residual, weights = problem()
    usual = weighted_low_rank(1e-3 * residual, weights, 4, method=method)
    tiny = weighted_low_rank(1e-3 * residual, weights * 2.0**-60, 4, method=method)
    assert len(tiny.losses) == len(usual.losses) > 2
    torch.testing.assert_close(tiny.factors.out @ tiny.factors.into, usual.factors.out @ usual.factors.into)
    assert tiny.losses[-1] == pytest.approx(2.0**-60 * usual.losses[-1])
