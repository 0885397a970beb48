"""Rows of a block-quantized matrix by themselves are the rows of the whole, to the bit."""

import pytest
import torch

from quantizers import BlockFormat, LayerStatistics, LloydMax, NormalFloat, weighted_error
from quantizers import rows as rows_module
from quantizers.packing import gather, pack
from quantizers.rows import aligned_rows, decode_rows, decode_runs, quantize_rows, runs

SHAPES = [(1, 1), (3, 7), (256, 64), (300, 96), (777, 65), (1025, 33)]


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch):
    monkeypatch.setattr(rows_module, "WEIGHTS_AT_ONCE", 256 * 64)


def _weight(shape: tuple[int, int]) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    weight[shape[0] // 2] = 0  # a row of zeros, as padding tokens have
    return weight


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_codes_are_gathered_from_anywhere(bits):
    codes = torch.randint(0, 2**bits, (1001,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    places = torch.tensor([[1000, 0, 31], [32, 33, 500]])
    assert torch.equal(gather(pack(codes, bits), bits, places), codes[places])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantizer", [LloydMax(3, 32, 4), LloydMax(6, 64, 6), NormalFloat(8, 64, 8), LloydMax(2, 16)])
def test_runs_quantize_to_the_bytes_of_the_whole(quantizer, shape):
    weight = _weight(shape)
    whole = quantizer.quantize(weight).tensors()
    in_runs = quantize_rows(lambda run: weight[run.start : run.stop], shape, quantizer.format).tensors()
    assert whole.keys() == in_runs.keys()
    assert all(torch.equal(whole[name], in_runs[name]) for name in whole)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantizer", [LloydMax(3, 32, 4), NormalFloat(8, 64, 8)])
def test_so_they_do_under_a_curvature(quantizer, shape):
    weight, read = _weight(shape), _weight((200, shape[1]))
    curvature = read.T @ read / 200
    whole = quantizer.quantize(weight, LayerStatistics(input_curvature=curvature)).dequantize()
    in_runs = quantize_rows(lambda run: weight[run.start : run.stop], shape, quantizer.format, curvature).dequantize()
    # products of other heights may round otherwise, and one code in many follows
    assert ((whole - in_runs).abs() > 1e-6).float().mean() < 0.01
    assert weighted_error(weight - in_runs, LayerStatistics(input_curvature=curvature)) == pytest.approx(
        weighted_error(weight - whole, LayerStatistics(input_curvature=curvature)), rel=0.02
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantizer", [LloydMax(3, 32, 4), LloydMax(5, 64, 3), NormalFloat(8, 128, 8)])
def test_rows_decode_to_those_of_the_whole(quantizer, shape):
    quantized = quantizer.quantize(_weight(shape))
    whole = quantized.dequantize()
    some = torch.tensor([shape[0] - 1, 0, shape[0] // 2, 0] * 200)  # more than are decoded at once
    assert torch.equal(decode_rows(quantized, some), whole[some])
    assert decode_rows(quantized, some[:0]).shape == (0, shape[1])
    for wrong in (-1, shape[0]):
        with pytest.raises(IndexError):
            decode_rows(quantized, torch.tensor([wrong]))
    assert torch.equal(torch.cat([part for _, part in decode_runs(quantized)]), whole)


def test_runs_are_whole_words_and_super_blocks():
    form = BlockFormat(3, 64, 4, 96, "lloyd")
    assert aligned_rows(form) == 96
    assert [run.start for run in runs((500, 4096), form)] == [0, 96, 192, 288, 384, 480]
    assert len(runs((500, 1), form)) == 1


def test_a_nan_is_refused():
    weight = _weight((300, 64))
    weight[299, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or an infinity"):
        quantize_rows(lambda run: weight[run.start : run.stop], (300, 64), LloydMax(4).format)
