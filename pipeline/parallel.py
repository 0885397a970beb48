"""Many small independent jobs on all cores: one job a core, each with one thread of its own.

torch splits single operations over threads; for matrices of a few hundred rows that costs more than it gives,
and its sums depend on the number of threads. One thread a job is faster and gives the same bytes on any number
of cores. Jobs of few large operations share a process; jobs of many small ones hinder one another there, for Python
runs in one thread at a time, and take processes of their own.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

import torch

from pipeline.errors import WorkerError

Job = TypeVar("Job")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Job], Result], jobs: Iterable[Job], num_workers: int | None = None
) -> Iterator[Result]:
    """`function` of each job, in their order, a few jobs ahead of the reader; one worker a core by default.

    The first exception ends it: jobs that have not started are dropped, and those under way are waited for.
    """
    threads_before = torch.get_num_threads()
    num_workers = num_workers or num_cores()
    pool = ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,))
    torch.set_num_threads(1)
    try:
        yield from _in_order(pool, num_workers, function, jobs)
    finally:
        torch.set_num_threads(threads_before)


def map_in_processes(
    function: Callable[[Job], Result], jobs: Iterable[Job], num_workers: int | None = None
) -> Iterator[Result]:
    """The same in processes; `function` (of a module, or a `partial` of one), jobs and results must pickle.

    Raises:
        WorkerError: a process died.
    """
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    num_workers = num_workers or num_cores()
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    try:
        yield from _in_order(pool, num_workers, function, jobs)
    except BrokenProcessPool:
        raise WorkerError(
            "A worker process died, most likely because the memory ran out. Close other programs and run the same "
            "command again: finished matrices are kept."
        ) from None


def _in_order(
    pool: Executor, num_workers: int, function: Callable[[Job], Result], jobs: Iterable[Job]
) -> Iterator[Result]:
    remaining = iter(jobs)
    try:
        running = [pool.submit(function, job) for job in islice(remaining, num_workers + 1)]
        while running:
            yield running.pop(0).result()
            running += [pool.submit(function, job) for job in islice(remaining, 1)]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def num_cores() -> int:
    """Of this machine."""
    return os.cpu_count() or 1


def _start_worker() -> None:
    """One thread; Ctrl-C is the parent's to handle; and no worker outlives a parent that was killed."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
