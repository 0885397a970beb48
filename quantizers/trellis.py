"""Trellis-coded quantization with the bitshift trellis of QTIP (Tseng et al. 2024, arXiv:2406.11235, section 3).

A state of L bits; each weight of a sequence shifts `bits` new ones in from the right, and the state's level is
the weight's value (drawn for L = 8, bits = 2):

    state of weight t       | a a | b b | c c | d d |        symbol of weight t: dd
    state of weight t + 1   | b b | c c | d d | e e |        symbol of weight t + 1: ee

So a weight costs `bits` bits, yet chooses among 2**L levels, of which its neighbours' choices leave it 2**bits.
Sequences bite their own tail: the first states read the last symbols, and nothing but the symbols is stored.

Legend: sequence, step (weights of a sequence), state (2**L).
"""

import functools
import json
import math
from pathlib import Path

import torch
from jaxtyping import Bool, Float32, Int32, Int64, UInt8
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from quantizers.compiled import closed_paths as compiled_paths
from quantizers.compiled import is_there
from quantizers.kernels.switch import KERNELS

BITS = range(1, 6)
STATE_BITS = range(6, 13)
LEVELS_FILE = Path(__file__).parent / "data" / "trellis_levels.safetensors"
ERRORS_KEY = "mean_squared_errors"  # of its metadata

# Weights that are searched for at once.
_SOME_WEIGHTS = 2**22
# Costs of a chunk of sequences, 1 MiB of float32: larger leaves the cache, smaller is lost in calls.
_CHUNK_COSTS = 2**18
# Weights on either side of a sequence's ends that decide how the ends join, in lengths of a state's memory and at
# least. QTIP takes half a sequence; the squared error grows by less than 0.05% from that and a third of the time goes.
_JOIN_MEMORIES = 8
_JOIN_LEAST = 24
# Beyond this a sum of squares would overflow float32.
_LARGEST_VALUE = 1e15


def trellis_levels(bits: int, state_bits: int = 8) -> Float32[Tensor, " state"]:
    """Trained levels of the 2**state_bits states for standard normal values, on the CPU.

    Args:
        bits: bits a weight.
        state_bits: L.
    Raises:
        ValueError: no levels were trained for these settings.
    Reference:
        `python -m quantizers.train_trellis` writes the file that they are read from.
    """
    trained = _trained_levels()
    if f"{bits}.{state_bits}" not in trained:
        known = ", ".join(name.replace(".", " bits with ") for name in sorted(trained))
        raise ValueError(
            f"no trellis levels of {bits} bits a weight with a state of {state_bits} bits; there are {known}"
        )
    return trained[f"{bits}.{state_bits}"].clone()


def has_trellis_levels(bits: int, state_bits: int) -> bool:
    """Were levels trained for these settings?"""
    return f"{bits}.{state_bits}" in _trained_levels()


def trellis_distortion(bits: int, state_bits: int) -> float:
    """Mean squared error of standard normal values in sequences of 256, as measured when the levels were trained."""
    _ = trellis_levels(bits, state_bits)  # raises where there are none
    return trained_errors()[f"{bits}.{state_bits}"]


@functools.cache
def _trained_levels() -> dict[str, Tensor]:
    return load_file(LEVELS_FILE)


@functools.cache
def trained_errors() -> dict[str, float]:
    """Mean squared errors by bits and state bits ("2.12")."""
    with safe_open(LEVELS_FILE, "pt") as file:
        return json.loads(file.metadata()[ERRORS_KEY])


@torch.no_grad()
def encode(
    values: Float32[Tensor, "sequence step"],
    levels: Float32[Tensor, " state"],
    bits: int,
) -> UInt8[Tensor, "sequence step"]:
    """The symbols whose decoded values have the least sum of (value - decoded)**2, sequence by sequence.

    The Viterbi algorithm, twice: once around the place where the ends join, to find the bits that they share, once
    over the sequence from and to these bits (QTIP, algorithm 4). With trained levels the error is on average 0.3% above
    the least possible for sequences of 256 weights, and 3% for 64. Biting the tail costs another 2% at 256 weights.

    Args:
        values: about standard normal for `trellis_levels`; not modified.
        levels: value of each state; their number sets L.
        bits: bits a weight, 1 to 5.
    Returns:
        Symbols below 2**bits, one a weight, on the device of `values`.
    Raises:
        ValueError: a setting is out of range, or a value or level is not finite or too large.
    """
    _check_settings(values.shape[1], levels, bits)
    _check_encodable(_are_encodable(values))
    if not bool(levels.isfinite().all()):
        raise ValueError("the levels hold NaN or infinity; take the ones of trellis_levels, or train them again")
    return find_symbols(values, levels, bits)


@torch.no_grad()
def find_symbols(
    values: Float32[Tensor, "sequence step"], levels: Float32[Tensor, " state"], bits: int
) -> UInt8[Tensor, "sequence step"]:
    """`encode` of what is known to be fine, or is asked about later: no answer of a GPU is waited for."""
    symbols = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    some_sequences = math.ceil(_SOME_WEIGHTS / values.shape[1])
    for start in range(0, len(values), some_sequences):
        some = slice(start, start + some_sequences)
        symbols[some] = _closed_paths(values[some], levels.to(values.device), bits)
    return symbols


def _closed_paths(
    values: Float32[Tensor, "sequence step"], levels: Float32[Tensor, " state"], bits: int
) -> UInt8[Tensor, "sequence step"]:
    join = _join(values.shape[1], len(levels), bits)
    found = compiled_paths(values, levels, bits, join)
    if found is None and KERNELS.serves(values):
        found = KERNELS.attempt(lambda: _kernel_paths(values, levels, bits, join))
    if found is not None:
        return found
    num_chunks = math.ceil(len(values) * len(levels) / _CHUNK_COSTS)
    chunk = math.ceil(len(values) / num_chunks)
    viterbi = _Viterbi(levels, bits, values.shape[1], chunk, join)
    return torch.cat([viterbi.closed_path(part.T.contiguous()) for part in values.split(chunk)], dim=1).T


def _kernel_paths(values: Tensor, levels: Tensor, bits: int, join: int) -> Tensor:
    from quantizers.kernels.viterbi import closed_paths  # it imports Triton

    return closed_paths(values, levels, bits, join)


def search_seconds(state_bits: int) -> float:
    """About how long `encode` takes for a million weights on one thread of a CPU."""
    return (2e-4 if is_there() else 3.3e-3) * 2**state_bits


def decode(
    symbols: UInt8[Tensor, "sequence step"], levels: Float32[Tensor, " state"], bits: int
) -> Float32[Tensor, "sequence step"]:
    """The values that symbols made by `encode` stand for: each is read from the last L bits, across the ends.

    Args:
        symbols: below 2**bits.
        levels: the ones of `encode`, on the device of `symbols`.
        bits: bits a weight, 1 to 5.
    Raises:
        ValueError: a setting is out of range, or a symbol has more than `bits` bits.
    """
    _check_settings(symbols.shape[1], levels, bits)
    is_traced = torch.compiler.is_compiling()  # whose values nobody knows, and which stored symbols cannot break
    if not is_traced and symbols.numel() and int(symbols.max()) >= 2**bits:
        raise ValueError(f"symbol {int(symbols.max())} does not fit in {bits} bits; symbols must be below {2**bits}")
    return values_of(symbols, levels, bits)


def values_of(
    symbols: UInt8[Tensor, "sequence step"], levels: Float32[Tensor, " state"], bits: int
) -> Float32[Tensor, "sequence step"]:
    """`decode` of symbols that are known to be fine: no answer of a GPU is waited for."""
    found = states(symbols, bits, len(levels).bit_length() - 1)
    return levels.index_select(0, found.view(-1)).view(symbols.shape)


class EncodableCheck:
    """Whether all values of a matrix could be encoded: said at once on a CPU, and on a GPU, which would be waited for
    with every call, at the end."""

    def __init__(self) -> None:
        self._are_fine: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Some values. Raises ValueError, unless it is left to `end`."""
        fine = _are_encodable(values)
        if values.device.type == "cpu":
            _check_encodable(fine)
        else:
            self._are_fine = fine if self._are_fine is None else self._are_fine & fine

    def end(self) -> None:
        """Raises ValueError if there was one among all values that could not."""
        if self._are_fine is not None:
            _check_encodable(self._are_fine)


def states(symbols: UInt8[Tensor, "sequence step"], bits: int, state_bits: int) -> Int32[Tensor, "sequence step"]:
    """The state of each weight: the last `state_bits` bits up to its symbol, across the ends."""
    wide = symbols.int()
    found = wide.clone()
    for age in range(1, math.ceil(state_bits / bits)):
        found |= wide.roll(age, 1) << (bits * age)
    return found & (2**state_bits - 1)


class _Viterbi:
    """Shortest paths through the trellis for many sequences at once, and the memory that they need.

    The sequences are the last, contiguous dimension of everything: each step is three passes over the costs
    [state, sequence]. Consecutive states share an overlap of L - bits bits, low in the first and high in the
    second; only the best cost of each overlap is kept, and the choices are found again on the way back.
    """

    def __init__(
        self, levels: Float32[Tensor, " state"], bits: int, num_steps: int, num_sequences: int, join: int
    ) -> None:
        self.bits = bits
        self.fanout = 2**bits
        self.num_overlaps = len(levels) >> bits
        self.levels = levels
        self.heads = torch.arange(self.fanout, device=levels.device)[:, None] * self.num_overlaps
        self.costs = levels.new_empty(len(levels), num_sequences)
        self.best = levels.new_empty(num_steps + 1, self.num_overlaps, num_sequences)
        self.join = join

    def closed_path(self, values: Float32[Tensor, "step sequence"]) -> UInt8[Tensor, "step sequence"]:
        """Symbols of a path that ends in the overlap in which it begins."""
        ends = values.roll(self.join, 0)[: 2 * self.join]
        self._forward(ends, first=None)
        last = self.best[2 * self.join, :, : values.shape[1]].min(0).indices  # argmin is ten times slower
        overlap = self._backward(ends, last, stop=self.join)[self.join] >> self.bits
        self._forward(values, first=overlap)
        return (self._backward(values, overlap, stop=0) & (self.fanout - 1)).to(torch.uint8)

    def _forward(self, values: Tensor, first: Int64[Tensor, " sequence"] | None) -> None:
        """Fill `best`: the least cost of reaching each overlap before each step, from overlap `first` or any."""
        num_steps, num_sequences = values.shape
        best = self.best[:, :, :num_sequences]
        best[0] = 0.0
        if first is not None:
            best[0] = torch.inf
            best[0].scatter_(0, first[None], 0.0)
        costs = self.costs[:, :num_sequences]
        entering = costs.view(self.num_overlaps, self.fanout, num_sequences)
        leaving = costs.view(self.fanout, self.num_overlaps, num_sequences)
        for step in range(num_steps):
            torch.sub(values[step], self.levels[:, None], out=costs)
            torch.addcmul(best[step][:, None], entering, entering, out=entering)
            torch.amin(leaving, 0, out=best[step + 1])

    def _backward(self, values: Tensor, last: Int64[Tensor, " sequence"], stop: int) -> Int64[Tensor, "step sequence"]:
        """States of the best path into overlap `last`; those of the steps before `stop` are left at 0."""
        states = torch.zeros_like(values, dtype=torch.int64)
        overlap = last
        for step in range(len(values) - 1, stop - 1, -1):
            candidates = self.heads + overlap
            levels = self.levels.index_select(0, candidates.view(-1)).view(candidates.shape)
            errors = values[step] - levels
            costs = self.best[step, :, : len(overlap)].gather(0, candidates >> self.bits).addcmul_(errors, errors)
            torch.gather(candidates, 0, costs.min(0, keepdim=True).indices, out=states[step : step + 1])
            overlap = states[step] >> self.bits
        return states


def _join(num_steps: int, num_levels: int, bits: int) -> int:
    """Steps on either side of a sequence's ends that are searched to join them."""
    memory = math.ceil(math.log2(num_levels) / bits)
    return min(num_steps // 2, max(_JOIN_LEAST, _JOIN_MEMORIES * memory))


def _check_settings(num_steps: int, levels: Tensor, bits: int) -> None:
    num_levels = len(levels)
    state_bits = num_levels.bit_length() - 1
    if bits not in BITS:
        raise ValueError(f"a trellis has {BITS[0]} to {BITS[-1]} bits a weight, not {bits}")
    if state_bits not in STATE_BITS or num_levels != 2**state_bits:
        raise ValueError(
            f"{num_levels} levels do not belong to a trellis: a state has {STATE_BITS[0]} to {STATE_BITS[-1]} bits, "
            f"and each state a level; give {2 ** STATE_BITS[0]} to {2 ** STATE_BITS[-1]} levels, a power of two"
        )
    if num_steps * bits < state_bits:
        raise ValueError(
            f"a sequence of {num_steps} weights of {bits} bits is shorter than a state of {state_bits} bits; "
            f"take at least {math.ceil(state_bits / bits)} weights a sequence"
        )


def _are_encodable(values: Tensor) -> Bool[Tensor, ""]:
    """Neither NaN nor infinite, and of a size whose square float32 has."""
    return (values.abs() <= _LARGEST_VALUE).all()


def _check_encodable(are_fine: Bool[Tensor, ""]) -> None:
    """Raises ValueError for what `_are_encodable` found."""
    if not bool(are_fine):
        raise ValueError(
            f"the values to encode hold NaN, infinity or a magnitude above {_LARGEST_VALUE:g}; "
            "scale them to the range of the levels and look for what made them NaN"
        )
