"""How fast this machine is, as one figure: what a large matrix product in float32 reaches."""

import functools
import time

import torch

SIZE, TIMES = 1024, 3


@functools.cache
def flops(device: str) -> float:
    """Floating-point operations a second, on all cores of a CPU; takes a tenth of a second."""
    first, second = (torch.randn(SIZE, SIZE, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(TIMES):
        started = time.perf_counter()
        float((first @ second)[0, 0])  # reading a number waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * SIZE**3 / best
