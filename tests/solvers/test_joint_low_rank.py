"""A shared right factor: exact for the stack, cheaper than separate ones where the row spaces coincide."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from solvers.joint_low_rank import JointFactors, joint_whitened_spectrum, joint_whitened_svd
from solvers.low_rank import errors_by_rank, whitened_spectrum, whitened_svd
from tests.solvers.weightings import FORMS, factor, whitened_error

OUTS, WIDTH = (12, 6, 6), 16


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrices(seed: int = 0) -> list[Tensor]:
    return [torch.randn(out, WIDTH, generator=rng(seed + i)) for i, out in enumerate(OUTS)]


def row_factors(form: str = "full") -> list[Tensor | None]:
    return [factor(out, form, 10 + i) for i, out in enumerate(OUTS)]


def total_error(
    residuals: list[Tensor], joint: JointFactors, rows: list[Tensor | None], columns: Tensor | None
) -> float:
    return sum(
        whitened_error(residual - joint.of(i).product(), rows[i], columns) for i, residual in enumerate(residuals)
    )


@pytest.mark.parametrize("row_form", FORMS)
@pytest.mark.parametrize("column_form", FORMS)
def test_the_error_is_the_optimum_of_the_stack(row_form: str, column_form: str) -> None:
    residuals, rows, columns = matrices(), row_factors(row_form), factor(WIDTH, column_form, 5)
    errors = errors_by_rank(joint_whitened_spectrum(residuals, rows, columns))
    for rank in (1, 4, WIDTH):
        joint = joint_whitened_svd(residuals, rows, columns, rank)
        assert [out.shape for out in joint.outs] == [(out, rank) for out in OUTS]
        assert joint.num_numbers == rank * (WIDTH + sum(OUTS))
        error = total_error(residuals, joint, rows, columns)
        assert error == pytest.approx(float(errors[rank]), rel=1e-3, abs=1e-5 * float(errors[0]))


def test_it_is_whitened_svd_of_the_stack_with_a_block_diagonal_row_factor() -> None:
    residuals, rows, columns = matrices(), row_factors(), factor(WIDTH, "full", 5)
    joint = joint_whitened_svd(residuals, rows, columns, 4)
    stacked = whitened_svd(torch.cat(residuals), torch.block_diag(*rows), columns, 4)
    torch.testing.assert_close(torch.cat(joint.outs) @ joint.into, stacked.product(), rtol=0, atol=1e-4)


def test_a_common_row_space_is_recovered_exactly() -> None:
    shared = torch.randn(3, WIDTH, generator=rng(7))
    residuals = [torch.randn(out, 3, generator=rng(i)) @ shared for i, out in enumerate(OUTS)]
    joint = joint_whitened_svd(residuals, row_factors(), factor(WIDTH, "full", 5), 3)
    for i, residual in enumerate(residuals):
        torch.testing.assert_close(joint.of(i).product(), residual, rtol=0, atol=1e-4)


@given(st.integers(2, 4), st.integers(0, 50))
@settings(max_examples=15)
def test_with_coinciding_row_spaces_sharing_is_free_and_at_equal_numbers_better(rank: int, seed: int) -> None:
    rows, columns = row_factors("diagonal"), factor(WIDTH, "diagonal", 5)
    right = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=rng(seed))).Q
    residuals = []
    for i, (out, row) in enumerate(zip(OUTS, rows, strict=True)):
        left = torch.linalg.qr(torch.randn(out, out, generator=rng(seed + i + 1))).Q
        values = torch.sort(torch.rand(out, generator=rng(seed + i + 9)), descending=True).values
        residuals.append((left * values) @ right[:out] / row[:, None] / columns)
    separate = sum(
        float(errors_by_rank(whitened_spectrum(residual, row, columns))[rank])
        for residual, row in zip(residuals, rows, strict=True)
    )
    joint = joint_whitened_svd(residuals, rows, columns, rank)
    assert total_error(residuals, joint, rows, columns) == pytest.approx(separate, rel=1e-3)
    separate_numbers = rank * (sum(OUTS) + len(OUTS) * WIDTH)
    larger = joint_whitened_svd(residuals, rows, columns, separate_numbers // (sum(OUTS) + WIDTH))
    assert larger.num_numbers <= separate_numbers
    assert total_error(residuals, larger, rows, columns) < separate


@given(st.integers(1, 6), st.integers(0, 50))
@settings(max_examples=15)
def test_sharing_is_a_constraint_at_equal_rank(rank: int, seed: int) -> None:
    residuals, rows, columns = matrices(seed), row_factors(), factor(WIDTH, "full", 5)
    joint = float(errors_by_rank(joint_whitened_spectrum(residuals, rows, columns))[rank])
    separate = sum(
        float(errors_by_rank(whitened_spectrum(residual, row, columns))[rank])
        for residual, row in zip(residuals, rows, strict=True)
    )
    assert joint >= separate * (1 - 1e-5)


def test_one_matrix_is_its_own_whitened_svd() -> None:
    residual, row, column = torch.randn(12, WIDTH, generator=rng(0)), factor(12, "full", 1), factor(WIDTH, "full", 2)
    joint = joint_whitened_svd([residual], [row], column, 5)
    alone = whitened_svd(residual, row, column, 5)
    torch.testing.assert_close(joint.of(0).product(), alone.product(), rtol=0, atol=1e-5)


def test_bad_input_is_refused() -> None:
    one, other = torch.ones(4, 5), torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"widths \[5, 6\] cannot share"):
        joint_whitened_svd([one, other], [None, None], None, 1)
    with pytest.raises(ValueError, match=r"widths \[\] cannot share.*one or more"):
        joint_whitened_svd([], [], None, 1)
    with pytest.raises(ValueError, match="2 matrices came with 1 row factors"):
        joint_whitened_svd([one, one], [None], None, 1)
    with pytest.raises(ValueError, match=r"row factor has shape \(5,\)"):
        joint_whitened_svd([one, one], [None, torch.ones(5)], None, 1)
    with pytest.raises(ValueError, match=r"rank 6 .* it must be 1 to 5"):
        joint_whitened_svd([one, one], [None, None], None, 6)
