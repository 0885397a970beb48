"""How long a trellis takes, by compiled loops and by torch. Prints one Markdown table; one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.trellis_search [--bits 3] [--rounds 3]

A normal matrix of 1536 x 576 is quantized with feedback on both sides, under made-up curvatures, and without: seconds
a million weights, the median of some rounds, both ways in turn. What is stored is compared, too.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from statistics import median

import torch
from torch import Tensor

from quantizers import LayerStatistics, TrellisCoded, compiled

SHAPE = (1536, 576)
STATE_BITS = (8, 10, 12)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    told = parser.parse_args()
    if not compiled.is_there():
        raise SystemExit("numba is not installed, so there are no loops to time")
    torch.set_num_threads(1)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    learnt = LayerStatistics(input_curvature=curvature(SHAPE[1], 1), output_curvature=curvature(SHAPE[0], 2))
    print(f"\n### Seconds a million weights of a trellis of {told.bits} bits, {date.today()}\n")
    print("| states | feedback | loops | torch | loops / torch | stored words that differ |")
    print("| --: | --- | --: | --: | --: | --: |")
    for state_bits in STATE_BITS:
        quantizer = TrellisCoded(told.bits, state_bits)
        for statistics in (learnt, None):
            seconds: dict[bool, list[float]] = {True: [], False: []}
            stored = {by_loops: timed(quantizer, weight, statistics, by_loops)[0] for by_loops in seconds}  # compiles
            for _ in range(told.rounds):
                for by_loops, each in seconds.items():
                    each.append(timed(quantizer, weight, statistics, by_loops)[1] / weight.numel() * 1e6)
            ours, theirs = (median(seconds[by_loops]) for by_loops in (True, False))
            print(
                f"| {2**state_bits} | {'both sides' if statistics else 'none'} | {ours:.2f} | {theirs:.2f} | "
                f"{ours / theirs:.2f} | {int((stored[True] != stored[False]).sum())} |",
                flush=True,
            )


def curvature(size: int, seed: int) -> Tensor:
    """Of inputs whose sizes span two orders of magnitude."""
    rows = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, -2, size)
    return rows.T @ rows / (2 * size)


def timed(
    quantizer: TrellisCoded, weight: Tensor, statistics: LayerStatistics | None, by_loops: bool
) -> tuple[Tensor, float]:
    """The codes as they are stored, and the seconds."""
    with searching(by_loops):
        began = time.perf_counter()
        found = quantizer.quantize(weight, statistics)
        return found.plain["weight_packed"], time.perf_counter() - began


@contextmanager
def searching(by_loops: bool) -> Iterator[None]:
    """Codes are searched for by compiled loops, or by torch, whatever would pay."""
    before, compiled.LEAST_COSTS = compiled.LEAST_COSTS, 0 if by_loops else 2**62
    try:
        yield
    finally:
        compiled.LEAST_COSTS = before


if __name__ == "__main__":
    main()
