"""The kernel finds torch's scales: where sums in another order lead to others, these are as good."""

import pytest
import torch
from torch import Tensor

from quantizers import scale_search
from quantizers.codebooks import lloyd_max, normal_float
from quantizers.kernels.switch import KernelSwitch
from quantizers.scale_search import nearest, search_scales

ON, OFF = KernelSwitch(("cpu",)), KernelSwitch(())


def found_by(kernels: KernelSwitch, blocks: Tensor, weights: Tensor | None, levels: Tensor) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale_search, "KERNELS", kernels)
        scales = search_scales(blocks, weights, levels)
    assert kernels.failure is None
    return scales


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("size", [16, 24, 128])
@pytest.mark.parametrize("levels", [lloyd_max(2), lloyd_max(3), normal_float(4), lloyd_max(5), lloyd_max(8)], ids=len)
def test_scales_are_the_same(levels: Tensor, size: int, is_weighted: bool) -> None:
    blocks = drawn(70, size, seed=1) * drawn(70, 1, seed=2).exp()
    blocks[3] = 0
    blocks[4] = 1e-38
    blocks[5, 1:] = 0  # one weight alone
    weights = drawn(70, size, seed=3).exp() if is_weighted else None
    if weights is not None:
        weights[6] = 0
        weights[7, ::2] = 0
    check(found_by(ON, blocks, weights, levels), found_by(OFF, blocks, weights, levels), blocks, weights, levels)


def check(found: Tensor, wanted: Tensor, blocks: Tensor, weights: Tensor | None, levels: Tensor) -> None:
    is_same = (found - wanted).abs() <= 1e-5 * wanted
    assert is_same.float().mean() > 0.9
    ours, torchs = (error(each, blocks, weights, levels) for each in (found, wanted))
    torch.testing.assert_close(ours, torchs, rtol=0.05, atol=0)
    torch.testing.assert_close(ours.sum(), torchs.sum(), rtol=1e-3, atol=0)


def error(scales: Tensor, blocks: Tensor, weights: Tensor | None, levels: Tensor) -> Tensor:
    """Of each block, weighted."""
    rounded = levels[nearest(blocks / scales.clamp_min(1e-30)[:, None], levels).long()] * scales[:, None]
    squares = (blocks - rounded).double().square()
    return (squares if weights is None else squares * weights).sum(dim=1)


def test_views_and_nothing() -> None:
    blocks, weights, levels = drawn(16, 40, seed=1), drawn(16, 40, seed=2).exp(), lloyd_max(3)
    given = blocks.T, weights.T, levels
    check(found_by(ON, *given), found_by(OFF, *given), *given)
    assert found_by(ON, torch.zeros(0, 32), None, levels).shape == (0,)


def test_where_the_kernel_fails_torch_searches(monkeypatch) -> None:
    blocks, levels, kernels = drawn(9, 32, seed=1), lloyd_max(3), KernelSwitch(("cpu",))
    monkeypatch.setattr("quantizers.kernels.scale_search.scale_search_kernel", None)
    monkeypatch.setattr(scale_search, "KERNELS", kernels)
    with pytest.warns(RuntimeWarning, match="kernels do not work"):
        found = search_scales(blocks, None, levels)
    assert torch.equal(found, found_by(OFF, blocks, None, levels))
