"""Quantizers on a CUDA device, beside their own answers on the CPU. Run with `pytest -m gpu`."""

import pytest
import torch

from quantizers import ErrorEstimator, LayerStatistics, LowRankPlus, quantizer_from_label, weighted_error
from quantizers.kernels.switch import KERNELS
from quantizers.trellis import decode, encode, trellis_levels

pytestmark = pytest.mark.gpu
LABELS = ["nf4-g64-s8", "lloyd3-g32-s4", "int3-g32-s6", "kmeans3-g32-s6", "e8p2", "trellis2", "trellis3-l12"]


@pytest.fixture(autouse=True)
def _by_kernels():
    """A kernel that fails leaves the work to torch, and would go unseen."""
    yield
    assert KERNELS.failure is None


def curvature(size: int, seed: int) -> torch.Tensor:
    rows = torch.randn(4 * size, size, generator=torch.Generator().manual_seed(seed))
    rows = rows * torch.linspace(0.2, 3, size)
    return rows.T @ rows / len(rows)


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(96, 144, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.fixture(scope="module", params=["none", "diagonal", "input", "kronecker"])
def statistics(request: pytest.FixtureRequest, weight: torch.Tensor) -> LayerStatistics | None:
    rows, columns = weight.shape
    if request.param == "none":
        return None
    if request.param == "diagonal":
        draw = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
        return LayerStatistics(fisher_diag=draw.exp())
    outputs = curvature(rows, 2) if request.param == "kronecker" else None
    return LayerStatistics(input_curvature=curvature(columns, 3), output_curvature=outputs)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("state_bits", [8, 12])
def test_the_trellis_finds_equally_good_paths(bits: int, state_bits: int) -> None:
    values = torch.randn(300, 256, generator=torch.Generator().manual_seed(bits))
    levels = trellis_levels(bits, state_bits)
    ours = decode(encode(values, levels, bits), levels, bits)
    theirs = decode(encode(values.cuda(), levels, bits), levels.cuda(), bits).cpu()
    assert (values - theirs).square().mean() == pytest.approx(float((values - ours).square().mean()), rel=1e-4)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_quantizer_does_as_well_as_on_the_cpu(
    label: str, rank: int, weight: torch.Tensor, statistics: LayerStatistics | None
) -> None:
    quantizer = quantizer_from_label(label)
    if rank:
        quantizer = LowRankPlus(quantizer, rank, 4)
    ours = quantizer.quantize(weight, statistics)
    theirs = quantizer.quantize(weight.cuda(), None if statistics is None else statistics.to("cuda"))
    assert all(tensor.is_cuda for tensor in theirs.tensors().values())
    expected = weighted_error(weight - ours.dequantize(), statistics)
    found = weighted_error(weight - theirs.dequantize().cpu(), statistics)
    assert found == pytest.approx(expected, rel=0.05)  # one code that rounds the other way changes all that follow


@pytest.mark.parametrize("num_rows", [16, 1000])
@pytest.mark.parametrize("label", LABELS)
def test_an_estimate_is_that_of_the_cpu(
    label: str, num_rows: int, weight: torch.Tensor, statistics: LayerStatistics | None
) -> None:
    found = [
        ErrorEstimator(each, None if statistics is None else statistics.to(str(each.device)), num_rows=num_rows, seed=0)
        for each in (weight, weight.cuda())
    ]
    here, there = (each.error(quantizer_from_label(label)) for each in found)
    assert there == pytest.approx(here, rel=1e-2)
