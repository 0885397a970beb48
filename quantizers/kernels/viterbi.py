"""The search of trellis.py: a sequence a program, which keeps the costs of all states in registers.

The least costs of every step go to memory, as there, and the choices are found again on the way back. States are laid
out [overlap that they follow, symbol], so that the costs before a step need no look-up; read in the same order as
[oldest symbol, overlap that they lead to], their least is a reduction.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, UInt8
from torch import Tensor

_SCRATCH_BYTES = 2**28  # for the costs of the sequences that are searched at once


@triton.jit
@no_type_check
def _forward(best, values, levels, reached, start, count, steps, NUM_OVERLAPS: tl.constexpr, FANOUT: tl.constexpr):
    """Costs of reaching each overlap after `count` steps from `start` on, and in `best` those before each step."""
    overlap = tl.arange(0, NUM_OVERLAPS)
    for place in range(count):
        tl.store(best + place * NUM_OVERLAPS + overlap, reached)
        step = (start + place) % steps
        error = tl.load(values + step) - levels
        costs = reached[:, None] + error * error
        reached = tl.min(tl.reshape(costs, [FANOUT, NUM_OVERLAPS]), axis=0)
    return reached


@triton.jit
@no_type_check
def _backward(
    symbols,
    best,
    values,
    levels,
    overlap,
    start,
    count,
    stop,
    steps,
    BITS: tl.constexpr,
    NUM_OVERLAPS: tl.constexpr,
):
    """The overlap from which the best path into `overlap` comes at `stop`; the symbols after it are stored."""
    head = tl.arange(0, 2**BITS)
    for back in range(count - stop):
        place = count - 1 - back
        step = (start + place) % steps
        state = head * NUM_OVERLAPS + overlap
        error = tl.load(values + step) - tl.load(levels + state)
        costs = tl.load(best + place * NUM_OVERLAPS + (state >> BITS)) + error * error
        chosen = tl.argmin(costs, axis=0) * NUM_OVERLAPS + overlap
        tl.store(symbols + step, (chosen & (2**BITS - 1)).to(tl.uint8))
        overlap = chosen >> BITS
    return overlap


@triton.jit
@no_type_check
def viterbi_kernel(symbols, best, values, levels, steps, join, BITS: tl.constexpr, STATE_BITS: tl.constexpr):
    """symbols and values are [sequences, steps]; best [sequences, steps, overlaps] is scratch."""
    FANOUT: tl.constexpr = 2**BITS
    NUM_OVERLAPS: tl.constexpr = 2 ** (STATE_BITS - BITS)
    sequence = tl.program_id(0).to(tl.int64)
    symbols, values = symbols + sequence * steps, values + sequence * steps
    best += sequence * steps * NUM_OVERLAPS
    of_states = tl.reshape(tl.load(levels + tl.arange(0, 2**STATE_BITS)), [NUM_OVERLAPS, FANOUT])
    # around the place where the ends join, then from and to the overlap found there
    anywhere = tl.zeros([NUM_OVERLAPS], tl.float32)
    reached = _forward(best, values, of_states, anywhere, steps - join, 2 * join, steps, NUM_OVERLAPS, FANOUT)
    overlap = tl.argmin(reached, axis=0)
    tl.debug_barrier()  # what other threads stored is read
    overlap = _backward(symbols, best, values, levels, overlap, steps - join, 2 * join, join, steps, BITS, NUM_OVERLAPS)
    tl.debug_barrier()
    there = tl.where(tl.arange(0, NUM_OVERLAPS) == overlap, 0.0, float("inf"))
    _forward(best, values, of_states, there, 0, steps, steps, NUM_OVERLAPS, FANOUT)
    tl.debug_barrier()
    _backward(symbols, best, values, levels, overlap, 0, steps, 0, steps, BITS, NUM_OVERLAPS)


def num_warps(num_states: int) -> int:
    """Of a program: 32 states a thread, at most."""
    return max(1, min(num_states // 1024, 8))


def closed_paths(
    values: Float32[Tensor, "sequence step"], levels: Float32[Tensor, " state"], bits: int, join: int
) -> UInt8[Tensor, "sequence step"]:
    """Symbols of the shortest closed paths, as `quantizers.compiled.closed_paths` has them; costs are rounded apart."""
    values, levels = values.contiguous(), levels.contiguous()
    num_sequences, num_steps = values.shape
    symbols = torch.empty(num_sequences, num_steps, dtype=torch.uint8, device=values.device)
    num_costs = num_steps * (len(levels) >> bits)
    at_once = max(1, min(num_sequences, _SCRATCH_BYTES // (4 * num_costs)))
    best = values.new_empty(at_once, num_costs)
    with torch.cuda.device_of(values):
        for some in range(0, num_sequences, at_once):
            here = slice(some, some + at_once)
            viterbi_kernel[(len(values[here]),)](
                symbols[here],
                best,
                values[here],
                levels,
                num_steps,
                join,
                BITS=bits,
                STATE_BITS=len(levels).bit_length() - 1,
                num_warps=num_warps(len(levels)),
            )
    return symbols
