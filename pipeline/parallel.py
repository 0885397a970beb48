"""Many small independent jobs on all cores: one job a thread, each with one thread of its own.

torch splits single operations over threads; for matrices of a few hundred rows that costs more than it gives,
and its sums depend on the number of threads. One thread a job is faster and gives the same bytes on any number
of cores.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


def map_in_order(function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """`function` of each job, in their order, a few jobs ahead of the reader.

    The first exception ends it: jobs that have not started are dropped, and those under way are waited for.
    """
    num_workers = os.cpu_count() or 1
    threads_before = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,))
    torch.set_num_threads(1)
    remaining = iter(jobs)
    try:
        running = [pool.submit(function, job) for job in islice(remaining, num_workers + 1)]
        while running:
            yield running.pop(0).result()
            running += [pool.submit(function, job) for job in islice(remaining, 1)]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads_before)
