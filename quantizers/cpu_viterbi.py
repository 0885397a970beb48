"""The search of trellis.py, compiled by numba for the CPU. compiled.py calls it, where numba is there.

The same operations in the same order as there, so the same symbols. What is saved are passes over memory: the costs of
a step stay in registers, for LANES sequences at once, and only the least of each overlap is written.
"""

from typing import Any

import numpy as np

from quantizers.cpu_loops import compile_loop

LANES = 24  # sequences that are searched together; 32 take 5% less time each, and are less often full
UNROLLED = 16  # states that lead to an overlap, in one part; a loop around more does not become vectors


def _closed_paths(bits: int) -> Any:
    """With `bits` a constant, the loop over the states that lead to an overlap is unrolled."""
    fanout = 1 << bits
    unrolled = min(fanout, UNROLLED)
    num_parts = fanout // unrolled
    mask = fanout - 1

    def closed_paths(
        all_targets: np.ndarray,
        all_roots: np.ndarray,
        negative_levels: np.ndarray,
        join: int,
        symbols: np.ndarray,
        first: int,
        stop: int,
    ) -> None:
        num_sequences, num_steps = all_targets.shape
        num_overlaps = negative_levels.size >> bits
        best = np.empty((num_steps + 1, num_overlaps, LANES), np.float32)  # least costs of reaching an overlap
        targets, roots = np.empty((num_steps, LANES), np.float32), np.empty((num_steps, LANES), np.float32)
        overlaps = np.zeros(LANES, np.int64)
        for group in range(first, stop):
            begin = group * LANES
            for lane in range(LANES):  # those to spare search for the last sequence's, too
                sequence = min(begin + lane, num_sequences - 1)
                for step in range(num_steps):
                    targets[step, lane] = all_targets[sequence, step]
                    roots[step, lane] = all_roots[sequence, step]
            for turn in range(2):  # around the place where the ends join, then from and to the overlap found there
                start, count, least_place = (num_steps - join, 2 * join, join) if turn == 0 else (0, num_steps, 0)
                best[0] = np.inf if turn else 0
                if turn:
                    for lane in range(LANES):
                        best[0, overlaps[lane], lane] = 0
                for place in range(count):
                    step = (start + place) % num_steps
                    for overlap in range(num_overlaps):
                        for lane in range(LANES):
                            best[place + 1, overlap, lane] = np.inf
                        for part in range(num_parts):
                            for lane in range(LANES):
                                least = best[place + 1, overlap, lane]
                                for head in range(unrolled):
                                    state = (part * unrolled + head) * num_overlaps + overlap
                                    error = targets[step, lane] + roots[step, lane] * negative_levels[state]
                                    cost = best[place, state >> bits, lane] + error * error
                                    least = cost if cost < least else least
                                best[place + 1, overlap, lane] = least
                if turn == 0:
                    overlaps[:] = 0
                    for lane in range(LANES):
                        for overlap in range(1, num_overlaps):
                            if best[count, overlap, lane] < best[count, overlaps[lane], lane]:
                                overlaps[lane] = overlap
                for place in range(count - 1, least_place - 1, -1):
                    step = (start + place) % num_steps
                    for lane in range(LANES):
                        chosen, least = 0, np.float32(np.inf)
                        for head in range(fanout):
                            state = head * num_overlaps + overlaps[lane]
                            error = targets[step, lane] + roots[step, lane] * negative_levels[state]
                            cost = best[place, state >> bits, lane] + error * error
                            if cost < least:
                                chosen, least = state, cost
                        overlaps[lane] = chosen >> bits
                        if turn and begin + lane < num_sequences:
                            symbols[begin + lane, step] = chosen & mask

    return compile_loop(closed_paths, f"closed_paths_{bits}", freedom={"contract"})


# By bits of a symbol: symbols [n, steps] of the groups `first` to `stop` of LANES sequences, whose targets are values
# times roots of weights; `join` as in trellis.py.
CLOSED_PATHS = {bits: _closed_paths(bits) for bits in range(1, 6)}
