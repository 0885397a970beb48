"""The workers of a runner: a cluster that is started here is kept for the next stages that want it.

It takes seconds to start, and its processes load torch again. `kept_workers` spans a run; `end_workers` ends it before
that, for its processes hold memory. What takes no time is made for each stage: threads, and the connection to a cluster
elsewhere, which may be away for a while between two stages.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from prefect.task_runners import TaskRunner

from flows.runner import Runner
from pipeline.errors import WorkerError

# a head asks for a token as soon as its machine has one, and Ray's client tells of that only by a timeout
TOKEN_HINT = ", and set RAY_AUTH_MODE=token here if it wants a token (`ray get-auth-token`)"
NOT_STARTED = "failed to start"  # what Dask says of a worker that was lost before it was there


class _Kept:
    """Started runners by what they were asked as, and how to end them."""

    def __init__(self) -> None:
        self.started: dict[Runner, TaskRunner] = {}
        self.stack = ExitStack()

    def end(self) -> None:
        self.started.clear()
        self.stack.close()


_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextmanager
def kept_workers() -> Iterator[None]:
    """Keep what is started within, until its end or `end_workers`."""
    kept = _Kept()
    before = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(before)
        kept.end()


def end_workers() -> None:
    """End those that are kept; who wants some later starts them again."""
    if (kept := _kept.get()) is not None:
        kept.end()


@contextmanager
def workers_of(runner: Runner) -> Iterator[TaskRunner]:
    """Kept ones, else new ones. One that is killed while they start takes the cluster along: it is tried once more.

    Raises:
        WorkerError: they did not start, twice; or no cluster is at the runner's address.
    """
    kept = _kept.get()
    if kept is not None and runner.starts_a_cluster:
        if runner not in kept.started:
            kept.started[runner] = _started_or_again(runner, kept.stack)
        yield kept.started[runner]
        return
    with ExitStack() as stack:
        yield _started_or_again(runner, stack)


def has_workers(started: TaskRunner) -> bool:
    """Dask waits for workers for ever; the other runners have theirs, or say that they are lost."""
    client = _client(started)
    return client is None or bool(client.scheduler_info(n_workers=-1).get("workers"))


def _started_or_again(runner: Runner, stack: ExitStack) -> TaskRunner:
    try:
        return _started(runner, stack)
    except RuntimeError as error:
        if NOT_STARTED not in str(error):
            raise
    try:
        return _started(runner, stack)
    except RuntimeError as again:
        raise WorkerError(
            f"The {runner.kind} workers did not start, tried twice: {again} Look at the memory and the disk of "
            "this machine, and run it again: what is finished is kept."
        ) from again


def _started(runner: Runner, stack: ExitStack) -> TaskRunner:
    try:
        started: TaskRunner = stack.enter_context(runner.task_runner())
        _client(started)  # Dask starts its cluster, or looks for the one there is, when first asked for this
    except OSError as error:
        if runner.address is None:
            raise
        hint = TOKEN_HINT if runner.kind == "ray" else ""
        raise WorkerError(
            f"No {runner.kind} cluster answers at {runner.address} ({' '.join(str(error).split())}). Check that "
            f"address in the setting `runner`, and that the cluster runs{hint}, and run it again: what is finished is "
            "kept."
        ) from error
    return started


def _client(started: TaskRunner) -> Any:
    return getattr(started, "client", None)
