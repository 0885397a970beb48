"""How long a trellis takes, by compiled loops and by torch. Prints one Markdown table; one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.trellis_search [--bits 3] [--rounds 3]

A normal matrix of 1536 x 576 is quantized with feedback on both sides, under made-up curvatures, and without: seconds
a million weights, the least of some rounds, both ways in turn. Symbols are compared, too.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date

import torch
from torch import Tensor

from quantizers import LayerStatistics, QuantizedTensor, TrellisCoded, compiled

SHAPE = (1536, 576)
STATE_BITS = (8, 10, 12)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    told = parser.parse_args()
    torch.set_num_threads(1)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    learnt = LayerStatistics(input_curvature=curvature(SHAPE[1], 1), output_curvature=curvature(SHAPE[0], 2))
    print(f"\n### Seconds a million weights of a trellis of {told.bits} bits, {date.today()}\n")
    print("| states | feedback | loops | torch | loops / torch | symbols that differ |")
    print("| --: | --- | --: | --: | --: | --: |")
    for state_bits in STATE_BITS:
        quantizer = TrellisCoded(told.bits, state_bits)
        for statistics in (learnt, None):
            ways = {loops: (lambda s=statistics, q=quantizer: q.quantize(weight, s)) for loops in (True, False)}
            results = {loops: timed(ways[loops], loops, told.rounds) for loops in ways}
            (ours, ours_seconds), (theirs, theirs_seconds) = results[True], results[False]
            differ = int((ours.plain["weight_packed"] != theirs.plain["weight_packed"]).sum())
            millions = weight.numel() / 1e6
            print(
                f"| {2**state_bits} | {'both sides' if statistics else 'none'} | {ours_seconds / millions:.2f} | "
                f"{theirs_seconds / millions:.2f} | {ours_seconds / theirs_seconds:.2f} | {differ} |",
                flush=True,
            )


def curvature(size: int, seed: int) -> Tensor:
    """Of inputs whose sizes span two orders of magnitude."""
    rows = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, -2, size)
    return rows.T @ rows / (2 * size)


def timed(run: Callable[[], QuantizedTensor], by_loops: bool, rounds: int) -> tuple[QuantizedTensor, float]:
    """What it gives, and the least seconds."""
    seconds = []
    with searching(by_loops):
        found = run()  # compiles
        for _ in range(rounds):
            began = time.perf_counter()
            found = run()
            seconds.append(time.perf_counter() - began)
    return found, min(seconds)


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
