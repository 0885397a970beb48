"""The search of trellis.py, compiled by numba for the CPU. compiled.py calls it, where numba is there.

The same operations in the same order as there, fused where torch fuses them, so the same symbols. What is saved are
passes over memory: the costs of a step stay in registers, for some sequences (lanes) at once, and only the least of
each overlap is written.
"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from quantizers.compiled import SEARCH_BYTES
from quantizers.cpu_loops import compile_loop

MOST_LANES = 48
VECTOR = 8  # lanes are a multiple of it
UNROLLED = 16  # states that lead to an overlap, in one part; a loop around more does not become vectors


def _is_fused() -> bool:
    """Does torch round once in addcmul, as its kernels for most processors do?"""
    draw = torch.Generator("cpu").manual_seed(0)
    a, b, c = torch.rand(3, 1000, generator=draw, dtype=torch.float32, device="cpu")  # whatever the defaults are
    return torch.equal(torch.addcmul(a, b, c), (a.double() + b.double() * c.double()).float())


_FUSED = _is_fused()


def _closed_paths(bits: int) -> Any:
    """With `bits` a constant, the loop over the states that lead to an overlap is unrolled."""
    fanout = 1 << bits
    unrolled = min(fanout, UNROLLED)
    num_parts = fanout // unrolled
    mask = fanout - 1

    def closed_paths(
        all_values: np.ndarray,
        levels: np.ndarray,
        join: int,
        symbols: np.ndarray,
        best: np.ndarray,
        first: int,
        stop: int,
    ) -> None:
        num_sequences, num_steps = all_values.shape
        num_overlaps, lanes = best.shape[1:]
        values = np.empty((num_steps, lanes), np.float32)
        overlaps = np.zeros(lanes, np.int64)
        for group in range(first, stop):
            begin = group * lanes
            for lane in range(lanes):  # those to spare search for the last sequence's, too
                sequence = min(begin + lane, num_sequences - 1)
                for step in range(num_steps):
                    values[step, lane] = all_values[sequence, step]
            for turn in range(2):  # around the place where the ends join, then from and to the overlap found there
                start, count, least_place = (num_steps - join, 2 * join, join) if turn == 0 else (0, num_steps, 0)
                best[0] = np.inf if turn else 0
                if turn:
                    for lane in range(lanes):
                        best[0, overlaps[lane], lane] = 0
                for place in range(count):
                    step = (start + place) % num_steps
                    for overlap in range(num_overlaps):
                        for lane in range(lanes):
                            best[place + 1, overlap, lane] = np.inf
                        for part in range(num_parts):
                            for lane in range(lanes):
                                least = best[place + 1, overlap, lane]
                                for head in range(unrolled):
                                    state = (part * unrolled + head) * num_overlaps + overlap
                                    error = values[step, lane] - levels[state]
                                    cost = best[place, state >> bits, lane] + error * error
                                    least = cost if cost < least else least
                                best[place + 1, overlap, lane] = least
                if turn == 0:
                    overlaps[:] = 0
                    for lane in range(lanes):
                        for overlap in range(1, num_overlaps):
                            if best[count, overlap, lane] < best[count, overlaps[lane], lane]:
                                overlaps[lane] = overlap
                for place in range(count - 1, least_place - 1, -1):
                    step = (start + place) % num_steps
                    for lane in range(lanes):
                        chosen, least = 0, np.float32(np.inf)
                        for head in range(fanout):
                            state = head * num_overlaps + overlaps[lane]
                            error = values[step, lane] - levels[state]
                            cost = best[place, state >> bits, lane] + error * error
                            if cost < least:
                                chosen, least = state, cost
                        overlaps[lane] = chosen >> bits
                        if turn and begin + lane < num_sequences:
                            symbols[begin + lane, step] = chosen & mask

    if _FUSED:
        return compile_loop(closed_paths, f"closed_paths_{bits}_fused", freedom={"contract"})
    return compile_loop(closed_paths, f"closed_paths_{bits}")


_CLOSED_PATHS = {bits: _closed_paths(bits) for bits in range(1, 6)}
_scratch = threading.local()


def num_lanes(num_sequences: int, num_steps: int, num_overlaps: int) -> int:
    """Of the groups in which so many sequences are searched."""
    most = SEARCH_BYTES // (4 * (num_steps + 1) * num_overlaps) // VECTOR * VECTOR
    most = max(VECTOR, min(most, MOST_LANES))
    num_groups = -(-num_sequences // most)
    return -(-num_sequences // (num_groups * VECTOR)) * VECTOR


def _search(bits: int) -> Callable[..., None]:
    def search(
        values: np.ndarray,
        levels: np.ndarray,
        join: int,
        lanes: int,
        symbols: np.ndarray,
        first: int,
        stop: int,
    ) -> None:
        shape = (values.shape[1] + 1, levels.size >> bits, lanes)
        size = int(np.prod(shape))
        if getattr(_scratch, "best", np.empty(0)).size < size:
            _scratch.best = np.empty(size, np.float32)
        best = _scratch.best[:size].reshape(shape)  # least costs of reaching an overlap
        _CLOSED_PATHS[bits](values, levels, join, symbols, best, first, stop)

    return search


# By bits of a symbol: symbols [n, steps] of the groups `first` to `stop` of `lanes` sequences; `join` as in trellis.py.
SEARCHES = {bits: _search(bits) for bits in range(1, 6)}
