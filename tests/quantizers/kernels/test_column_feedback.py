"""The kernel rounds columns in turn as torch does."""

import pytest
import torch
from torch import Tensor

from quantizers import block_rounding
from quantizers.block_grid import BlockGrid
from quantizers.block_rounding import _columns_in_turn
from quantizers.codebooks import lloyd_max, normal_float
from quantizers.kernels.switch import KernelSwitch


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found_by(kernels: KernelSwitch, target: Tensor, grid: BlockGrid, right: Tensor) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_rounding, "KERNELS", kernels)
        return _columns_in_turn(target, grid, right)


def case(levels: Tensor, has_zeros: bool, rows: int, width: int) -> tuple[Tensor, BlockGrid, Tensor]:
    """Two tiles; the third row has a scale of zero."""
    scales = drawn(rows, 2, 1, seed=1).abs() + 0.5
    scales[2:3] = 0
    zeros = torch.full((rows, 2, 1), 2.0) if has_zeros else None
    right = torch.eye(width) + 0.3 * drawn(2, width, width, seed=2).triu(1)
    return drawn(rows, 2, width, seed=3), BlockGrid(scales, levels, zeros), right


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 24), (40, 16)])
@pytest.mark.parametrize(
    ("levels", "has_zeros"),
    [
        *((lloyd_max(bits), False) for bits in (2, 4, 5, 8)),
        (normal_float(3), False),
        *((torch.arange(2.0**bits), True) for bits in (2, 3, 4, 5, 8)),
    ],
    ids=[*(f"lloyd{bits}" for bits in (2, 4, 5, 8)), "nf3", *(f"int{bits}" for bits in (2, 3, 4, 5, 8))],
)
def test_codes_and_values_are_the_same(levels: Tensor, has_zeros: bool, rows: int, width: int) -> None:
    given = case(levels, has_zeros, rows, width)
    kernels = KernelSwitch(("cpu",))
    codes, values = found_by(kernels, *given)
    wanted_codes, wanted_values = found_by(KernelSwitch(()), *given)
    assert kernels.failure is None
    # A weight half-way between two levels may fall to the other side, and the columns after it then follow.
    same_rows = (codes == wanted_codes).all(dim=2)
    assert same_rows.float().mean() > 0.9
    torch.testing.assert_close(values[same_rows], wanted_values[same_rows], rtol=1e-6, atol=1e-6)


def test_nothing_is_rounded_to_nothing() -> None:
    kernels = KernelSwitch(("cpu",))
    codes, values = found_by(kernels, *case(lloyd_max(3), False, 0, 16))
    assert kernels.failure is None
    assert codes.shape == values.shape == (0, 2, 16)
    assert codes.dtype == torch.uint8


def test_views_are_read_and_left_alone() -> None:
    target, grid, right = case(lloyd_max(3), False, 9, 16)
    view = target.transpose(0, 1).contiguous().transpose(0, 1)
    kernels = KernelSwitch(("cpu",))
    first, second = found_by(kernels, view, grid, right), found_by(kernels, target, grid, right)
    assert torch.equal(first[0], second[0])
    assert torch.equal(view, case(lloyd_max(3), False, 9, 16)[0])


def test_where_the_kernel_fails_torch_rounds(monkeypatch) -> None:
    given = case(lloyd_max(3), False, 9, 16)
    monkeypatch.setattr("quantizers.kernels.column_feedback.column_feedback_kernel", None)
    with pytest.warns(RuntimeWarning, match="kernels do not work"):
        codes, values = found_by(KernelSwitch(("cpu",)), *given)
    wanted = found_by(KernelSwitch(()), *given)
    assert torch.equal(codes, wanted[0])
    assert torch.equal(values, wanted[1])
