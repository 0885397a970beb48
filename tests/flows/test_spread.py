"""Matrices on threads with children, on Dask and on Ray: the same bytes from workers that share only a URL."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.loopback import free_port
from pipeline.errors import NonFiniteError, RecipeError, WorkerError
from pipeline.model import open_model
from pipeline.stages import StageLog
from registry import Registry
from tests.registry.at_url import registry_at


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """With its blobs at a URL."""
    return registry_at((tmp_path / "store").as_uri(), tmp_path / "registry")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.batch.PARAMS_A_BATCH", 3 * 64 * 64)


@pytest.fixture(autouse=True)
def _workers_find_the_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask and Ray send it by its module's name, and some package may bring a `tests` of its own."""
    here = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, str(Path.cwd())]))


def _quantized(*arguments: Any) -> dict[str, bytes]:
    from spread_flow import quantized  # type: ignore[import-not-found]  # Prefect wants its settings first

    return quantized(*arguments)


def _tasks(model_dir: Path, registry: Registry, runner: str, log: StageLog | None = None) -> Any:
    from flows.runner import Runner
    from flows.spread import TaskSpread

    return TaskSpread(open_model(str(model_dir)), registry, None, Runner.parse(runner), log or StageLog())


@pytest.mark.parametrize("runner", ["threads:2", "dask:2", pytest.param("ray:2", marks=pytest.mark.slow)])
def test_every_runner_makes_the_bytes_of_the_cores_here(
    server: None, small_batches: None, tiny_model_dir: Path, registry: Registry, tmp_path: Path, runner: str
) -> None:
    from pipeline.spread import over_cores

    here = _quantized(tmp_path / "here", tiny_model_dir, over_cores)
    log = StageLog()
    with log.stage("decompose"):
        there = _quantized(tmp_path / "there", tiny_model_dir, _tasks(tiny_model_dir, registry, runner, log))
        assert log.workers_peak_bytes > 50_000_000  # torch alone takes more
    assert log.stages[0].peak_memory_bytes >= log.workers_peak_bytes
    assert len(here) == 14
    assert there == here


@pytest.mark.slow
def test_a_killed_dask_worker_costs_nothing_but_time(
    server: None, small_batches: None, tiny_model_dir: Path, registry: Registry, tmp_path: Path
) -> None:
    from distributed import LocalCluster

    from pipeline.spread import over_cores

    here = _quantized(tmp_path / "here", tiny_model_dir, over_cores)
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        killed = []

        def kill_one(number: int) -> None:
            if number == 0:
                killed.append(next(iter(cluster.workers.values())).pid)
                os.kill(killed[0], signal.SIGKILL)

        tasks = _tasks(tiny_model_dir, registry, f"dask:{cluster.scheduler_address}")
        there = _quantized(tmp_path / "there", tiny_model_dir, tasks, kill_one)
    assert killed
    assert there == here


@pytest.fixture
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a cluster's clients connect: a head with two workers, started as its operator would."""
    ports = [free_port() for _ in range(2)]
    command = ["start", "--head", "--block", "--num-cpus", "2", "--include-dashboard", "false", "--disable-usage-stats"]
    command += ["--port", str(ports[0]), "--ray-client-server-port", str(ports[1]), "--node-ip-address", "127.0.0.1"]
    log = tmp_path_factory.mktemp("ray") / "log.txt"
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with log.open("w") as file:
        head = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), *command], env=environment, stdout=file, stderr=file
        )
    give_up_at = time.monotonic() + 120
    while not _answers(ports[1]):
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < give_up_at, log.read_text()
        time.sleep(0.5)
    yield f"ray://127.0.0.1:{ports[1]}"
    head.terminate()  # and what it started, as it says
    head.wait(60)


def _answers(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_ray_cluster_by_its_address_makes_the_bytes_of_the_cores_here(
    server: None, small_batches: None, tiny_model_dir: Path, registry: Registry, tmp_path: Path, ray_head: str
) -> None:
    """Twice, for Ray's client leaves things behind."""
    from pipeline.spread import over_cores

    here = _quantized(tmp_path / "here", tiny_model_dir, over_cores)
    for name in ("first", "second"):
        tasks = _tasks(tiny_model_dir, registry, f"ray:{ray_head}")
        assert _quantized(tmp_path / name, tiny_model_dir, tasks) == here


def test_a_cluster_without_a_worker_is_an_error_and_no_endless_wait(
    server: None, tiny_model_dir: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import LocalCluster

    from flows import spread

    monkeypatch.setattr(spread, "SECONDS_BETWEEN_LOOKS", 0.2)
    monkeypatch.setattr(spread, "MOST_SECONDS_WITHOUT_WORKERS", 1.0)
    with LocalCluster(n_workers=0, dashboard_address=None) as cluster:
        tasks = _tasks(tiny_model_dir, registry, f"dask:{cluster.scheduler_address}")
        with pytest.raises(WorkerError, match="There has been no worker for 1 seconds"):
            _quantized(tmp_path / "made", tiny_model_dir, tasks)


def test_finished_matrices_are_not_made_again(
    server: None, small_batches: None, tiny_model_dir: Path, registry: Registry, tmp_path: Path
) -> None:
    tasks, folder = _tasks(tiny_model_dir, registry, "threads:1"), tmp_path / "made"

    def stop_half_way(number: int) -> None:
        if number == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _quantized(folder, tiny_model_dir, tasks, stop_half_way)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert 7 <= len(before) < 14
    assert len(_quantized(folder, tiny_model_dir, tasks)) == 14
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}.items()


def test_an_error_in_a_batch_is_the_stage_s_error(
    server: None, damaged_model_dir: Path, registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(NonFiniteError, match="down_proj"):
        _quantized(tmp_path / "made", damaged_model_dir, _tasks(damaged_model_dir, registry, "threads:1"))


def test_a_child_that_is_killed_is_named_with_its_matrix(
    server: None, tiny_model_dir: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tried again, for the memory may be there by then; then the error."""
    from spread_flow import die_at_second_matrix

    from flows import spread

    monkeypatch.setattr(spread, "measured_batch", die_at_second_matrix)
    monkeypatch.setattr(spread.make, "retry_delay_seconds", [0, 0])
    with pytest.raises(WorkerError, match=r"Out of memory in decompose, matrix model\.layers\.0\.self_attn\.k_proj"):
        _quantized(tmp_path / "made", tiny_model_dir, _tasks(tiny_model_dir, registry, "threads:1"))


class _KilledWorker:
    """In the place of a future: Dask has tried the work on several workers, and all were killed."""

    def add_done_callback(self, tell: Any) -> None:
        tell(self)

    def result(self) -> None:
        raise type("KilledWorker", (Exception,), {})


@pytest.fixture
def killed_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import runner, spread

    workers = SimpleNamespace(submit=lambda task, parameters: _KilledWorker())
    monkeypatch.setattr(runner.Runner, "task_runner", lambda self: nullcontext(workers))
    monkeypatch.setattr(spread, "_told_where_the_server_is", nullcontext)


def test_what_a_lost_worker_was_doing_is_named(
    killed_workers: None, tiny_model_dir: Path, registry: Registry, tmp_path: Path
) -> None:
    from pipeline.decompose import QuantizeMatrix

    tasks, model = _tasks(tiny_model_dir, registry, "dask:1"), open_model(str(tiny_model_dir))
    work = QuantizeMatrix(model, {matrix.module: "nf4-g64-s8" for matrix in model.matrices}, None, tmp_path)
    named = (
        r"lost in decompose, matrices model\.layers\.0\.self_attn\.q_proj\.weight, .*k_proj\.weight, .* and 11 more,"
    )
    with pytest.raises(WorkerError, match=rf"A worker was {named} and those after it .*\(KilledWorker\)"):
        list(tasks(work, model.matrices))


def test_which_part_of_the_statistics_a_lost_worker_had_is_named(
    killed_workers: None, tiny_model_dir: Path, registry: Registry
) -> None:
    import torch

    from flows.runner import Runner
    from flows.spread import PartsSpread

    model = open_model(str(tiny_model_dir))
    parts = PartsSpread(model, registry, "fisher", 0, "cpu", Runner.parse("ray:1"), StageLog())
    with pytest.raises(WorkerError, match="A worker was lost in statistics, part 1 of 2, and"):
        list(parts(torch.zeros(2, 8, dtype=torch.long), [range(1), range(1, 2)]))


@pytest.mark.parametrize("text", ["slurm", "threads:", "threads:0", "threads:many", "dask:"])
def test_a_runner_that_is_none(text: str) -> None:
    from flows.runner import Runner

    with pytest.raises(RecipeError, match=r"task runner|At least 1"):
        Runner.parse(text)


def test_runners_by_their_words() -> None:
    from flows.runner import Runner

    assert Runner.parse("threads").is_here
    assert Runner.parse("threads").num_workers == os.cpu_count()
    assert Runner.parse("dask:3") == Runner("dask", 3, None)
    assert Runner.parse("dask:tcp://10.0.0.1:8786").address == "tcp://10.0.0.1:8786"
    assert Runner.parse("ray:ray://head:10001").address == "ray://head:10001"
