"""`make bench-flows`, its parts: what is handed to the runners, by fakes in their place, and the simulation."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from benchmarks.flows_speed import Bench, Handing, simulate
from pipeline.model import open_model
from registry import Registry


@pytest.fixture
def bench(tiny_model_dir: Path, tmp_path: Path) -> Bench:
    run: Any = SimpleNamespace(model=open_model(str(tiny_model_dir)), registry=Registry(tmp_path / "registry"))
    statistics: Any = None
    labels = {matrix.module: SimpleNamespace(label="nf4-g64-s8") for matrix in run.model.matrices}
    return Bench(run, statistics, SimpleNamespace(matrices=labels), tmp_path)


class _Done:
    def add_done_callback(self, tell: Callable[["_Done"], None]) -> None:
        tell(self)

    def result(self) -> None:
        pass


def test_empty_batches_are_handed_out_and_the_children_closed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import runner

    submitted: list[Any] = []

    def submit(task: Any, arguments: dict[str, Any]) -> _Done:
        submitted.append(arguments)
        return _Done()

    workers = SimpleNamespace(submit=submit)
    monkeypatch.setattr(runner.Runner, "task_runner", lambda self: nullcontext(workers))
    monkeypatch.setattr("benchmarks.in_flow.in_flow", lambda work: (work(), UUID(int=0)))
    monkeypatch.setattr("benchmarks.flows_speed.EMPTY_BATCHES", 3)
    closed: list[dict[str, Any]] = []
    monkeypatch.setattr("flows.child.close_idle", lambda **options: closed.append(options))
    bench.hand_out("threads:1")
    assert closed
    assert [(each["batch"]["names"], each["in_child"]) for each in submitted] == [([], True)] * 4


def test_a_stage_on_a_runner_is_given_that_runner_s_workers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(Bench, "_do", lambda self, stage, work, spread: given.append(spread))
    monkeypatch.setattr("benchmarks.in_flow.in_flow", lambda work: (work(), UUID(int=0)))
    monkeypatch.setattr("benchmarks.flows_speed._task_runs", lambda flow_run: [_task_run()])
    measured = bench._stage("costs", "dask:2", bench.folder / "work")
    assert (measured.num_tasks, measured.num_workers) == (1, 2)
    assert given[0].runner.kind == "dask"


def _task_run() -> Any:
    from datetime import UTC, datetime

    now = datetime.now(UTC)
    return SimpleNamespace(start_time=now, end_time=now)


def test_the_simulation_is_list_scheduling() -> None:
    nothing = Handing(empty=0.0, submit=0.0)
    assert simulate([3, 1, 1, 1], 2, 2.0, nothing) == (6.0, 1.0, 0.0)
    assert simulate([1, 1, 1, 3], 2, 2.0, nothing)[0] == 8.0
    seconds, working, empty = simulate([1, 1], 1, 1.0, Handing(empty=1.0, submit=0.5))
    assert (seconds, working, empty) == (4.5, pytest.approx(2 / 4.5), pytest.approx(2 / 4.5))
