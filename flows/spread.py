"""A pipeline.spread.Spread over Prefect's task runners: a batch of matrices a task, on whatever machine the runner has.

Only JSON crosses the border; results come back as blobs (pipeline/batch.py).
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypedDict

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import TaskRunner
from safetensors.torch import load_file
from torch import Tensor

from flows.child import Say, borrowed_child, close_idle
from flows.cluster import has_workers, workers_of
from flows.failures import only_lost_workers_and_network
from flows.runner import Runner
from pipeline.batch import Batch, Blob, PartBatch, batches_of, part_batches, take_result
from pipeline.batch_worker import make_batch, make_part
from pipeline.curvature_sums import Metric
from pipeline.errors import WorkerError
from pipeline.memory import device_peak_bytes, forget_device_peaks
from pipeline.model import Matrix, Model
from pipeline.spread import MatrixTask
from pipeline.stages import StageLog, forget_peak, peak_memory_bytes
from pipeline.summed_parts import layer_file
from registry import Artifact, Registry

SECONDS_BETWEEN_LOOKS = 10.0
MOST_SECONDS_WITHOUT_WORKERS = 90.0
NUM_TOLD = 3  # matrices that a message names
# what Dask and Ray raise once they have given up; by name, for either may not be installed
LOST_WORKERS = {"KilledWorker", "WorkerCrashedError", "OutOfMemoryError", "NodeDiedError", "LocalRayletDiedError"}

Future = PrefectFuture["Made"]


class Made(TypedDict):
    """What a worker leaves: blobs by the names of matrices or of layers' files, and the memory that it took them."""

    blobs: dict[str, Blob]
    peak_memory_bytes: int
    device_peak_bytes: int


@dataclass(frozen=True)
class TaskSpread:
    """See the module's docstring.

    Attributes:
        statistics: what the task reads; None for an unweighted error.
        runner: has the workers.
        log: told what memory they took.
    """

    model: Model
    registry: Registry
    statistics: Artifact | None
    runner: Runner
    log: StageLog

    def __call__(self, matrix_task: MatrixTask, matrices: Sequence[Matrix]) -> Iterator[None]:
        """Yields once for each matrix, finished ones first."""
        by_name = {matrix.name: matrix for matrix in matrices}
        todo = [matrix for matrix in matrices if not matrix_task.file(matrix).exists()]
        yield from (None for _ in range(len(matrices) - len(todo)))
        if not todo:
            return
        batches = batches_of(matrix_task, todo, self.model, self.statistics, self.registry)
        in_child = self.runner.is_here
        try:
            with _told_where_the_server_is(), workers_of(self.runner) as started:
                futures: dict[Future, str] = {}
                for name, batch in _named(batches):
                    asked = {"batch": batch, "in_child": in_child}
                    futures[started.submit(make.with_options(task_run_name=name), asked)] = _told(batch)
                for future in _as_they_finish(futures, started):
                    for name, blob in _taken(future, futures[future], self.log).items():
                        take_result(self.registry, blob, matrix_task.file(by_name[name]))
                        yield None
        finally:
            close_idle(but=1)  # the stages that follow use one at a time


@dataclass(frozen=True)
class PartsSpread:
    """A pipeline.statistics.SpreadParts over Dask or Ray: a part of the calibration windows a task, a machine each.

    Attributes: see TaskSpread and pipeline.batch.PartBatch.
    """

    model: Model
    registry: Registry
    metric: Metric
    seed: int
    device: str
    runner: Runner
    log: StageLog

    def __call__(self, used: Tensor, parts: Sequence[range]) -> Iterator[Callable[[int], dict[str, Tensor]]]:
        """Yields the parts in their order; later ones are collected meanwhile."""
        batches = part_batches(
            used, parts, self.model, self.registry, metric=self.metric, seed=self.seed, device=self.device
        )
        with _told_where_the_server_is(), workers_of(self.runner) as started:
            futures: dict[Future, str] = {}
            for number, batch in enumerate(batches, start=1):
                name = f"statistics, part {number} of {len(batches)}"
                futures[started.submit(collect.with_options(task_run_name=name), {"batch": batch})] = name
            for future in _in_order([*futures], started):
                yield partial(self._layer, _taken(future, futures[future], self.log))

    def _layer(self, blobs: dict[str, Blob], layer: int) -> dict[str, Tensor]:
        return load_file(self.registry.store.path(blobs[layer_file(layer)]["sha256"]))


@contextmanager
def _told_where_the_server_is() -> Iterator[None]:
    """Without PREFECT_API_URL each worker would start a server of its own, for it knows nothing of this process's."""
    with get_client(sync_client=True) as client:
        url = str(client.api_url)
    with temporary_settings({PREFECT_API_URL: url}):
        yield


def _as_they_finish(futures: Collection[Future], started: TaskRunner) -> Iterator[Future]:
    """Raises WorkerError if there is nobody to finish them."""
    finished: SimpleQueue[Future] = SimpleQueue()
    for future in futures:
        future.add_done_callback(finished.put)
    num_left, idle_since = len(futures), time.monotonic()
    while num_left:
        try:
            yield finished.get(timeout=SECONDS_BETWEEN_LOOKS)
            num_left, idle_since = num_left - 1, time.monotonic()
        except Empty:
            if has_workers(started):
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > MOST_SECONDS_WITHOUT_WORKERS:
                raise WorkerError(
                    f"There has been no worker for {MOST_SECONDS_WITHOUT_WORKERS:.0f} seconds: all were lost, or none "
                    "could start. Look at their logs, give them more memory, and run it again: what is finished is "
                    "kept."
                ) from None


def _in_order(futures: list[Future], started: TaskRunner) -> Iterator[Future]:
    waiting, number = set(futures), 0
    for future in _as_they_finish(futures, started):
        waiting.discard(future)
        while number < len(futures) and futures[number] not in waiting:
            yield futures[number]
            number += 1


def _taken(future: Future, doing: str, log: StageLog) -> dict[str, Blob]:
    try:
        made = future.result()
    except Exception as error:
        if type(error).__name__ not in LOST_WORKERS:
            raise
        raise WorkerError(
            f"A worker was lost in {doing}, and those after it with the same work ({type(error).__name__}), most "
            "likely because their memory ran out. Give the workers more of it, or start fewer on a machine, and run it "
            "again: what is finished is kept."
        ) from error
    log.worker_took(made["peak_memory_bytes"], made["device_peak_bytes"])
    return made["blobs"]


def _named(batches: list[Batch]) -> Iterator[tuple[str, Batch]]:
    for number, batch in enumerate(batches, start=1):
        yield f"{batch['stage']}, part {number} of {len(batches)}", batch


def _told(batch: Batch) -> str:
    """`decompose, matrices model.layers.0.mlp.up_proj.weight, model.layers.0.mlp.down_proj.weight and 5 more`"""
    first, num_more = batch["names"][:NUM_TOLD], max(0, len(batch["names"]) - NUM_TOLD)
    return f"{batch['stage']}, matrices {', '.join(first)}" + f" and {num_more} more" * bool(num_more)


RETRIED: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": 2,
    "retry_delay_seconds": [5, 30],
    "retry_condition_fn": only_lost_workers_and_network,
}


@task(**RETRIED)
def collect(batch: PartBatch) -> Made:
    """The sums over a part of the calibration windows."""
    return _measured(lambda: make_part(batch))


@task(**RETRIED)
def make(batch: Batch, in_child: bool) -> Made:
    """The work of a stage on some matrices."""
    if not in_child:
        return measured_batch(batch, lambda text: None)
    with borrowed_child() as child:
        return child.call(measured_batch, batch, lambda text: None, doing=batch["stage"])


def measured_batch(batch: Batch, say: Say) -> Made:
    """`make_batch`, with the memory that this process took for it."""
    return _measured(lambda: make_batch(batch, say))


def _measured(work: Callable[[], dict[str, Blob]]) -> Made:
    forget_peak()
    forget_device_peaks()
    return Made(blobs=work(), peak_memory_bytes=peak_memory_bytes(), device_peak_bytes=device_peak_bytes())
