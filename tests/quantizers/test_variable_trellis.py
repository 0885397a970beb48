"""A trellis whose tiles have bits of their own: better than a uniform one at equal bits, nothing lost in packing."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from quantizers import LayerStatistics, TrellisCoded, VariableTrellis, VariableTrellisFormat, weighted_error
from quantizers.tile_rates import TileRates
from tests.quantizers.helpers import normal_weight

SHAPE = (96, 160)


def steep(n: int, seed: int) -> Tensor:
    """A second moment with eigenvalues 1, 1/4, 1/9 ... in random directions."""
    basis = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)))[0]
    return (basis / torch.arange(1, n + 1) ** 2) @ basis.T


@pytest.fixture(scope="module")
def curved() -> LayerStatistics:
    return LayerStatistics(input_curvature=steep(SHAPE[1], 0), output_curvature=steep(SHAPE[0], 1))


def error(quantizer: TrellisCoded | VariableTrellis, statistics: LayerStatistics) -> float:
    weight = normal_weight(SHAPE)
    return weighted_error(weight - quantizer.quantize(weight, statistics).dequantize(), statistics)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_beats_the_same_bits_for_all_tiles(bits: int, curved: LayerStatistics) -> None:
    assert error(VariableTrellis(float(bits)), curved) < 0.85 * error(TrellisCoded(bits), curved)


def test_every_eighth_of_a_bit_is_worth_something(curved: LayerStatistics) -> None:
    quantizers = [VariableTrellis(2 + eighths / 8) for eighths in range(9)]
    expected = [quantizer.loss(quantizer.sides(SHAPE, curved, torch.device("cpu"))) for quantizer in quantizers]
    assert all(after < before for before, after in pairwise(expected))
    assert error(quantizers[-1], curved) < 0.5 * error(quantizers[0], curved)


@pytest.mark.parametrize("kind", ["none", "input", "kronecker"])
def test_tiles_have_the_bits_that_the_pivots_ask_for(kind: str, curved: LayerStatistics) -> None:
    statistics = {"none": None, "input": replace(curved, output_curvature=None), "kronecker": curved}[kind]
    quantizer = VariableTrellis(2.5)
    stored = quantizer.quantize(normal_weight(SHAPE), statistics).plain
    rates = TileRates(stored["weight_row_rates"], stored["weight_column_rates"], stored["weight_num_ahead"])
    bits = rates.bits()
    assert bits.sum() == 2.5 * bits.numel()
    columns, rows = (bits.double().mean(dim=dim) for dim in (0, 1))
    assert (columns[-1] - columns[0] > 0.5) == (kind != "none")  # what is rounded last counts more
    assert (rows[-1] - rows[0] > 0.5) == (kind == "kronecker")


def test_a_uniform_rate_packs_the_symbols_of_a_uniform_trellis() -> None:
    weight = normal_weight(SHAPE)
    uniform, variable = (quantizer.quantize(weight) for quantizer in (TrellisCoded(3), VariableTrellis(3.0)))
    torch.testing.assert_close(variable.dequantize(), uniform.dequantize())
    assert torch.equal(variable.plain["weight_packed"], uniform.plain["weight_packed"])


def test_rates_that_do_not_add_up_are_refused() -> None:
    quantized = VariableTrellis(2.5).quantize(normal_weight(SHAPE))
    damaged = quantized.plain | {"weight_row_rates": quantized.plain["weight_row_rates"] + 16}
    with pytest.raises(ValueError, match=r"the tiles take \d+ words by their rates, but 1200 are there"):
        replace(quantized, plain=damaged).dequantize()


@pytest.mark.parametrize("ahead", [-(2**31), 2**31 - 1])
def test_any_number_of_tiles_ahead_is_read_or_refused(ahead: int) -> None:
    quantized = VariableTrellis(2.5).quantize(normal_weight(SHAPE))
    damaged = quantized.plain | {"weight_num_ahead": torch.tensor([ahead], dtype=torch.int32)}
    with pytest.raises(ValueError, match="the file is damaged"):
        replace(quantized, plain=damaged).dequantize()


def test_more_states_are_taken_where_levels_were_trained_for_them() -> None:
    form = VariableTrellisFormat(2.5, 10)
    assert [form.state_bits_of(width) for width in range(1, 6)] == [8, 10, 10, 10, 8]
    assert len(form.levels) == 2 * 256 + 3 * 1024
    assert [len(form.levels_of(width, form.levels)) for width in range(1, 6)] == [256, 1024, 1024, 1024, 256]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((0.5,), "bits is 0.5; it must be 1 to 5, in steps of 0.125"),
        ((2.3,), "bits is 2.3"),
        ((float("nan"),), "bits is nan"),
        ((5.125,), "bits is 5.125"),
        ((2.0, 9), "state_bits is 9; no trellis levels"),
        ((2.0, 8, -1), "seed is -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: tuple, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        VariableTrellis(*settings)
