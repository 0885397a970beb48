"""Encoding reaches the exact optimum of a plain search, decoding is the plain walk through the trellis."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers.trellis import decode, encode, trellis_distortion, trellis_levels

TRAINED = [(bits, state_bits) for state_bits in (8, 12) for bits in range(1, 6)] + [(bits, 10) for bits in (2, 3, 4)]
LLOYD_MAX_ERRORS = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}  # Max 1960, table I


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_symbols(bits: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def errors(values: Tensor, symbols: Tensor, levels: Tensor, bits: int) -> Tensor:
    """Squared error of each sequence."""
    return (values - decode(symbols, levels, bits)).double().square().sum(1)


def walk(symbols: list[int], levels: list[float], bits: int) -> list[float]:
    """The values, bit shift by bit shift; a first round brings the state into its loop."""
    state, values = 0, []
    for symbol in symbols + symbols:
        state = (state << bits | symbol) % len(levels)
        values.append(levels[state])
    return values[len(symbols) :]


def exact_errors(values: Tensor, levels: Tensor, bits: int) -> Tensor:
    """Least error of each sequence over all closed paths: one search for each state to start behind and end in."""
    state = torch.arange(len(levels))
    successors = (state[:, None] << bits | torch.arange(2**bits)) % len(levels)
    least = torch.full((len(values),), torch.inf, dtype=torch.float64)
    for last in state.tolist():
        cost = torch.full((len(values), len(levels)), torch.inf, dtype=torch.float64)
        cost[:, last] = 0
        for step in range(values.shape[1]):
            metric = (values[:, step, None] - levels).double().square()
            reached = torch.full_like(cost, torch.inf)
            for symbol in range(2**bits):
                reached.scatter_reduce_(1, successors[:, symbol].expand_as(cost), cost, "amin")
            cost = reached + metric
        least = torch.minimum(least, cost[:, last])
    return least


@given(bits=st.integers(1, 5), state_bits=st.integers(6, 9), extra=st.integers(0, 20), seed=st.integers(0, 10**6))
def test_decode_walks_through_the_trellis(bits: int, state_bits: int, extra: int, seed: int) -> None:
    levels = normal(2**state_bits, seed=seed)
    symbols = random_symbols(bits, 3, -(-state_bits // bits) + extra, seed=seed)
    expected = [walk(row, levels.tolist(), bits) for row in symbols.tolist()]
    assert decode(symbols, levels, bits).tolist() == expected


@given(bits=st.integers(1, 5), shift=st.integers(0, 30), seed=st.integers(0, 10**6))
def test_a_sequence_has_no_beginning(bits: int, shift: int, seed: int) -> None:
    levels, symbols = normal(64, seed=seed), random_symbols(bits, 2, 30, seed=seed)
    assert torch.equal(decode(symbols.roll(shift, 1), levels, bits), decode(symbols, levels, bits).roll(shift, 1))


@pytest.mark.parametrize(("bits", "steps"), [(1, 6), (1, 9), (2, 4), (3, 3), (4, 2), (5, 2)])
def test_the_exact_search_is_brute_force(bits: int, steps: int) -> None:
    levels, values = normal(64, seed=1), normal(4, steps, seed=2)
    every = torch.tensor(list(itertools.product(range(2**bits), repeat=steps)), dtype=torch.uint8)
    decoded = decode(every, levels, bits)
    brute = (values[:, None] - decoded).double().square().sum(2).amin(1)
    torch.testing.assert_close(exact_errors(values, levels, bits), brute, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", range(1, 6))
def test_encode_reaches_the_exact_optimum(bits: int) -> None:
    levels, values = normal(64, seed=1), normal(24, 64, seed=2)
    reached = errors(values, encode(values, levels, bits), levels, bits)
    exact = exact_errors(values, levels, bits)
    assert (reached >= exact * (1 - 1e-5)).all()
    assert reached.sum() <= 1.005 * exact.sum()
    assert (reached <= exact * (1 + 1e-5)).float().mean() >= 0.75  # most sequences: exactly


@settings(max_examples=40)
@given(bits=st.integers(1, 5), state_bits=st.integers(6, 9), steps=st.integers(9, 80), seed=st.integers(0, 10**6))
def test_a_path_through_the_trellis_is_found_again(bits: int, state_bits: int, steps: int, seed: int) -> None:
    levels = normal(2**state_bits, seed=seed)
    values = decode(random_symbols(bits, 5, steps, seed=seed), levels, bits)
    assert torch.equal(decode(encode(values, levels, bits), levels, bits), values)


@settings(max_examples=25)
@given(bits=st.integers(1, 5), state_bits=st.integers(6, 8), extra=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_symbols_are_valid_down_to_the_shortest_sequence(bits: int, state_bits: int, extra: int, seed: int) -> None:
    values = normal(4, -(-state_bits // bits) + extra, seed=seed)
    symbols = encode(values, normal(2**state_bits, seed=seed), bits)
    assert symbols.dtype == torch.uint8
    assert symbols.shape == values.shape
    assert int(symbols.max()) < 2**bits


def test_sequences_do_not_see_each_other() -> None:
    levels, values = normal(4096, seed=1), normal(150, 24, seed=2)  # three chunks
    together = encode(values, levels, 2)
    apart = torch.cat([encode(part, levels, 2) for part in values.split(7)])
    assert torch.equal(together, apart)


def test_inputs_are_left_alone_and_views_are_read() -> None:
    levels, values = normal(64, seed=1), normal(40, 6, seed=2)
    kept = [x.clone() for x in (levels, values)]
    symbols = encode(values.T, levels, 2)
    assert all(torch.equal(x, y) for x, y in zip((levels, values), kept, strict=True))
    assert torch.equal(symbols, encode(values.T.contiguous(), levels, 2))


def test_no_sequences() -> None:
    assert encode(torch.zeros(0, 256), normal(256), 2).shape == (0, 256)
    assert decode(torch.zeros(0, 256, dtype=torch.uint8), normal(256), 2).shape == (0, 256)


@pytest.mark.parametrize("bits", [0, 6])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 5 bits a weight, not {bits}"):
        encode(normal(2, 256), normal(256), bits)
    with pytest.raises(ValueError, match=f"1 to 5 bits a weight, not {bits}"):
        decode(random_symbols(1, 2, 256), normal(256), bits)


@pytest.mark.parametrize("num_levels", [0, 1, 32, 100, 8192])
def test_another_number_of_levels_is_refused(num_levels: int) -> None:
    with pytest.raises(ValueError, match=f"{num_levels} levels do not belong to a trellis.*64 to 4096"):
        encode(normal(2, 256), normal(num_levels), 2)


def test_a_sequence_shorter_than_a_state_is_refused() -> None:
    with pytest.raises(ValueError, match="3 weights of 2 bits is shorter than a state of 8 bits; take at least 4"):
        encode(normal(5, 3), normal(256), 2)
    with pytest.raises(ValueError, match="take at least 4"):
        decode(random_symbols(2, 5, 3), normal(256), 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e16])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    values = normal(3, 20)
    values[1, 7] = bad
    with pytest.raises(ValueError, match="values to encode hold NaN, infinity or a magnitude above 1e\\+15"):
        encode(values, normal(64), 2)


def test_levels_that_are_no_numbers_are_refused() -> None:
    levels = normal(64)
    levels[5] = torch.nan
    with pytest.raises(ValueError, match="levels hold NaN"):
        encode(normal(3, 20), levels, 2)


def test_a_symbol_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="symbol 4 does not fit in 2 bits"):
        decode(torch.full((1, 8), 4, dtype=torch.uint8), normal(64), 2)


@pytest.mark.parametrize(("bits", "state_bits"), TRAINED)
def test_trained_levels_beat_scalar_levels(bits: int, state_bits: int) -> None:
    levels, values = trellis_levels(bits, state_bits), normal(64, 256, seed=9)
    assert levels.dtype == torch.float32
    assert levels.shape == (2**state_bits,)
    mean = errors(values, encode(values, levels, bits), levels, bits).sum() / values.square().sum()
    assert 4.0**-bits < mean < 0.8 * LLOYD_MAX_ERRORS[bits]


@pytest.mark.parametrize(("bits", "state_bits"), TRAINED)
def test_the_distortion_is_that_of_other_values(bits: int, state_bits: int) -> None:
    levels, values = trellis_levels(bits, state_bits), normal(64, 256, seed=4)
    mean = float(errors(values, encode(values, levels, bits), levels, bits).sum() / values.numel())
    assert trellis_distortion(bits, state_bits) == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize(("bits", "state_bits"), TRAINED)
def test_trained_levels_are_odd(bits: int, state_bits: int) -> None:
    levels = trellis_levels(bits, state_bits)
    assert torch.equal(levels, -levels.flip(0))
    symbols = random_symbols(bits, 2, 50)
    complement = 2**bits - 1 - symbols
    assert torch.equal(decode(complement, levels, bits), -decode(symbols, levels, bits))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_longer_state_has_less_error(bits: int) -> None:
    values = normal(64, 256, seed=9)
    by_length = [
        errors(values, encode(values, levels, bits), levels, bits).sum()
        for levels in (trellis_levels(bits, state_bits) for state_bits in (8, 10, 12))
    ]
    assert by_length == sorted(by_length, reverse=True)


def test_trained_levels_cannot_be_changed_from_outside() -> None:
    trellis_levels(2).zero_()
    assert trellis_levels(2).abs().max() > 1


def test_settings_without_trained_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="no trellis levels of 5 bits a weight with a state of 10 bits; there are"):
        trellis_levels(5, 10)
