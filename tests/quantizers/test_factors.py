"""Stored factors: sizes to the bit, exact codes, and how much of a correction survives the rounding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers.factors import (
    BLOCK_SIZE,
    FACTOR_BITS,
    FactorFormat,
    dequantize_factors,
    quantize_factors,
    quantize_into,
    quantize_out,
    rounded,
)
from quantizers.packing import unpack
from quantizers.symmetric_uniform import largest_code
from solvers.low_rank import Factors

FEW_BITS = [bits for bits in FACTOR_BITS if bits < 16]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def factors(rows: int, columns: int, rank: int, seed: int = 0) -> Factors:
    return Factors(
        torch.randn(rows, rank, generator=rng(seed)), 0.01 * torch.randn(rank, columns, generator=rng(seed + 1))
    )


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 9), st.sampled_from(FACTOR_BITS), st.integers(0, 9))
@settings(max_examples=40)
def test_stored_is_what_the_specs_say_to_the_bit(rows: int, columns: int, rank: int, bits: int, seed: int) -> None:
    form = FactorFormat(bits)
    stored = quantize_factors(factors(rows, columns, rank, seed), form)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}
    assert found == form.tensor_specs((rows, columns), rank)
    size = sum(8 * tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert form.size_bits((rows, columns), rank) == size
    assert all(tensor.is_contiguous() for tensor in stored.values())


@given(st.integers(1, 300), st.integers(1, 6), st.sampled_from(FACTOR_BITS), st.integers(0, 9))
@settings(max_examples=40)
def test_components_of_many_factors_round_together_as_they_are_stored(n: int, rank: int, bits: int, seed: int) -> None:
    form, pairs = FactorFormat(bits), [factors(n, n, rank, seed + 2 * i) for i in range(3)]
    together = rounded(torch.cat([part for pair in pairs for part in (pair.out.T, pair.into)]), form).split(rank)
    for index, pair in enumerate(pairs):
        read = dequantize_factors(quantize_factors(pair, form), form, (n, n), rank)
        torch.testing.assert_close(together[2 * index].T, read.out, rtol=0, atol=0)
        torch.testing.assert_close(together[2 * index + 1], read.into, rtol=0, atol=0)


def test_the_size_by_hand() -> None:
    words = math.ceil(8 * 576 * 4 / 32) + math.ceil(8 * 1536 * 4 / 32)
    scales = 8 * math.ceil(576 / 128) + 8 * 12
    assert FactorFormat(4).size_bits((576, 1536), 8) == 32 * words + 16 * scales
    assert FactorFormat(16).size_bits((576, 1536), 8) == 16 * 8 * (576 + 1536)


@pytest.mark.parametrize("bits", FEW_BITS)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(5, 3, 2), (128, 129, 3), (300, 64, 1)])
def test_dequantized_is_code_times_scale_number_by_number(bits: int, rows: int, columns: int, rank: int) -> None:
    form = FactorFormat(bits)
    stored = quantize_factors(factors(rows, columns, rank), form)
    back = dequantize_factors(stored, form, (rows, columns), rank)

    def by_hand(name: str, length: int) -> Tensor:
        codes = unpack(stored[f"{name}_packed"], bits, rank * length).tolist()
        scales = stored[f"{name}_scale"].float()
        numbers = [
            (codes[r * length + k] - largest_code(bits)) * float(scales[r, k // BLOCK_SIZE])
            for r in range(rank)
            for k in range(length)
        ]
        return torch.tensor(numbers).view(rank, length)

    assert torch.equal(back.out, by_hand("low_rank_out", rows).T)
    assert torch.equal(back.into, by_hand("low_rank_in", columns))


def test_sixteen_bits_are_bfloat16() -> None:
    given_factors = factors(20, 30, 4)
    back = dequantize_factors(quantize_factors(given_factors, FactorFormat()), FactorFormat(), (20, 30), 4)
    assert torch.equal(back.out, given_factors.out.bfloat16().float())
    assert torch.equal(back.into, given_factors.into.bfloat16().float())


def test_more_bits_are_nearer() -> None:
    given_factors = factors(200, 300, 6)
    product = given_factors.product()
    by_bits = [
        float((product - dequantize_factors(quantize_factors(given_factors, f), f, (200, 300), 6).product()).norm())
        for f in (FactorFormat(bits) for bits in sorted(FACTOR_BITS))
    ]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_bits[0] < 0.35 * float(product.norm())
    assert by_bits[sorted(FACTOR_BITS).index(8)] < 0.02 * float(product.norm())


@given(st.floats(1e-3, 1e3), st.sampled_from(FEW_BITS))
@settings(max_examples=15)
def test_the_split_between_the_factors_hardly_matters(share: float, bits: int) -> None:
    one, form = factors(100, 90, 3), FactorFormat(bits)
    other = Factors(one.out * share, one.into / share)
    first, second = (dequantize_factors(quantize_factors(f, form), form, (100, 90), 3).product() for f in (one, other))
    errors = [float((product - one.product()).norm()) for product in (first, second)]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


def test_weights_move_the_error_to_where_it_weighs_little() -> None:
    one, form = factors(256, 256, 4), FactorFormat(4)
    one = Factors(one.out**3, one.into**3)
    rows, columns = torch.exp(2 * torch.randn(256, generator=rng(2))), torch.exp(2 * torch.randn(256, generator=rng(3)))

    def weighted_error(stored: dict[str, Tensor]) -> float:
        back = dequantize_factors(stored, form, (256, 256), 4)
        return float((rows[:, None] * (back.out - one.out) ** 2).sum())

    weighted = quantize_out(one.out, form, rows) | quantize_into(one.into, form, columns)
    assert weighted_error(weighted) < 0.97 * weighted_error(quantize_factors(one, form))


@pytest.mark.parametrize("bits", FACTOR_BITS)
def test_zero_factors_and_dead_rows_come_back_as_zeros(bits: int) -> None:
    form = FactorFormat(bits)
    one = factors(40, 30, 2)
    one.out[7], one.into[:, 3] = 0, 0
    back = dequantize_factors(quantize_factors(one, form), form, (40, 30), 2)
    assert not back.out[7].any()
    assert not back.into[:, 3].any()
    nothing = Factors(torch.zeros(40, 2), torch.zeros(2, 30))
    assert not dequantize_factors(quantize_factors(nothing, form), form, (40, 30), 2).product().any()


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bits of a factor is 5; it must be one of \(16, 8, 6, 4, 3\)"):
        FactorFormat(5)
    one, form = factors(4, 5, 2), FactorFormat(4)
    stored = quantize_factors(one, form)
    with pytest.raises(ValueError, match=r"rank 3 .* low_rank_out_packed"):
        dequantize_factors(stored, form, (4, 5), 3)
    with pytest.raises(ValueError, match=r"low_rank_out .*but nothing is there"):
        dequantize_factors(stored, FactorFormat(16), (4, 5), 2)
    for bits in FACTOR_BITS:
        one.into[1, 1] = float("nan")
        with pytest.raises(ValueError, match="L2 has a NaN"):
            quantize_factors(one, FactorFormat(bits))
