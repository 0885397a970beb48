"""Whitening turns a weighted norm into a plain one, can be undone, and refuses factors it would misread."""

import pytest
import torch
from torch import Tensor

from solvers.low_rank import whitened_spectrum, whitened_svd
from solvers.whitening import unwhiten, whiten
from tests.solvers.weightings import FORMS, factor, whitened_error


@pytest.mark.parametrize("form", FORMS)
def test_the_plain_norm_of_the_whitened_is_the_weighted_norm(form: str) -> None:
    matrix = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    rows = factor(12, form, 1)
    assert float(whiten(matrix, rows).square().sum()) == pytest.approx(whitened_error(matrix, rows, None), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_unwhiten_undoes_whiten(form: str) -> None:
    matrix = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    rows = factor(12, form, 1)
    torch.testing.assert_close(unwhiten(whiten(matrix, rows), rows), matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.eye(5), r"factor has shape \(5, 5\); .* ask for \(6, 6\), \(6,\)"),
        (torch.ones(7), r"factor has shape \(7,\)"),
        (torch.ones(6, 5), r"factor has shape \(6, 5\)"),
        (torch.ones(6, 6), "not lower triangular.*cholesky"),
        (torch.eye(6).triu(0) + torch.ones(6, 6).triu(1), "not lower triangular"),
        (torch.zeros(6), r"not positive \(0.0\).*Add damping"),
        (torch.eye(6) - 2 * torch.ones(6).diag(), r"not positive \(-1.0\)"),
        (torch.full((6,), torch.nan), "not positive"),
    ],
)
def test_a_factor_that_would_be_misread_is_refused(bad: Tensor, message: str, axis: str) -> None:
    matrix = torch.ones(6, 6)
    pair = (bad, None) if axis == "row" else (None, bad)
    with pytest.raises(ValueError, match=f"The {axis} .*{message}"):
        whitened_svd(matrix, *pair, 2)
    with pytest.raises(ValueError, match=f"The {axis} .*{message}"):
        whitened_spectrum(matrix, *pair)
