"""The kernel's search finds paths as good as torch's, and nearly always the same."""

import pytest
import torch
from torch import Tensor

from quantizers import trellis
from quantizers.kernels import viterbi
from quantizers.kernels.switch import KernelSwitch
from quantizers.trellis import decode, encode


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _by_the_kernel(monkeypatch):
    monkeypatch.setattr(trellis, "compiled_paths", lambda *_: None)
    monkeypatch.setattr(trellis, "KERNELS", KernelSwitch(("cpu",)))


def by_torch(*arguments: Tensor | int) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trellis, "KERNELS", KernelSwitch(()))
        return encode(*arguments)


@pytest.mark.parametrize(
    ("bits", "state_bits", "steps"), [(1, 6, 12), (2, 6, 3), (2, 8, 33), (3, 10, 20), (4, 8, 9), (5, 12, 5)]
)
def test_paths_are_as_good(bits: int, state_bits: int, steps: int) -> None:
    levels, values = drawn(2**state_bits, seed=1), drawn(5, steps, seed=2)
    found, wanted = encode(values, levels, bits), by_torch(values, levels, bits)
    left, least = ((values - decode(symbols, levels, bits)).square().sum(1) for symbols in (found, wanted))
    torch.testing.assert_close(left, least, rtol=1e-5, atol=1e-6)
    assert (found == wanted).float().mean() > 0.9
    assert trellis.KERNELS.failure is None


def test_a_path_is_found_again_whatever_the_scratch_holds(monkeypatch) -> None:
    levels = drawn(64, seed=1)
    symbols = torch.randint(0, 4, (7, 20), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    values = decode(symbols, levels, 2)
    monkeypatch.setattr(viterbi, "_SCRATCH_BYTES", 3 * 4 * 20 * 16)  # for three sequences, so a part is left over
    real, num_filled = Tensor.new_empty, []

    def filled(self: Tensor, *size, **options) -> Tensor:
        made = real(self, *size, **options)
        num_filled.append(made.numel() if made.is_floating_point() else 0)
        return made.fill_(-torch.inf) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", filled)
    assert torch.equal(decode(encode(values, levels, 2), levels, 2), values)
    assert trellis.KERNELS.failure is None
    assert sum(num_filled) > 0


def test_nothing_is_encoded_to_nothing() -> None:
    assert encode(torch.zeros(0, 12), drawn(64, seed=1), 2).shape == (0, 12)
    assert trellis.KERNELS.failure is None


def test_views_are_read_and_left_alone() -> None:
    levels, values = drawn(64, seed=1), drawn(9, 4, seed=2)
    before = values.clone()
    assert torch.equal(encode(values.T, levels, 2), encode(values.T.contiguous(), levels, 2))
    assert torch.equal(values, before)
    assert trellis.KERNELS.failure is None


def test_where_the_kernel_fails_torch_searches(monkeypatch) -> None:
    levels, values = drawn(64, seed=1), drawn(3, 12, seed=2)
    monkeypatch.setattr(viterbi, "viterbi_kernel", None)
    with pytest.warns(RuntimeWarning, match="kernels do not work"):
        found = encode(values, levels, 2)
    assert torch.equal(found, by_torch(values, levels, 2))
