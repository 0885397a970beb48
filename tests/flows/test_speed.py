"""`make bench-flows`, its parts: what is handed to the runners, by fakes in their place, and the simulation."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from benchmarks.flows_speed import Bench, Handing, Measured, both, simulate
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


def test_the_stages_on_a_runner_are_given_that_runner_s_workers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(Bench, "_do", lambda self, stage, work, spread: given.append((stage, spread)))
    monkeypatch.setattr("benchmarks.in_flow.in_flow", lambda work: (work(), UUID(int=0)))
    runs = [_task_run("costs, part 1 of 1", 3.0)] + [_task_run(f"decompose, part {n} of 2", 5.0) for n in (1, 2)]
    monkeypatch.setattr("benchmarks.flows_speed._task_runs", lambda flow_run: runs)
    measured = bench._stages("dask:2", bench.folder / "work")
    assert [(each.num_tasks, each.num_workers, each.tasks) for each in measured.values()] == [(1, 2, 3.0), (2, 2, 10.0)]
    assert [(stage, spread.runner.kind) for stage, spread in given] == [("costs", "dask"), ("decompose", "dask")]


def test_both_stages_as_one() -> None:
    stages = {"costs": Measured(10.0, 12.0, 2.0, 4, 2), "decompose": Measured(20.0, 36.0, 0.0, 6, 2)}
    assert both(stages) == Measured(30.0, 48.0, 2.0, 10, 2)
    assert both(stages).idle() == 8.0
    assert both(stages).orchestration(0.3) == pytest.approx(1 - 45 / 60)
    assert both(stages).orchestration(0.3, with_start=False) == pytest.approx(1 - 45 / 56)


def _task_run(name: str, seconds: float) -> Any:
    from datetime import UTC, datetime, timedelta

    now = datetime.now(UTC)
    return SimpleNamespace(name=name, start_time=now, end_time=now + timedelta(seconds=seconds))


def test_the_simulation_is_list_scheduling() -> None:
    nothing = Handing(empty=0.0, submit=0.0)
    assert simulate([3, 1, 1, 1], 2, 2.0, nothing) == (6.0, 1.0, 0.0)
    assert simulate([1, 1, 1, 3], 2, 2.0, nothing)[0] == 8.0
    seconds, working, empty = simulate([1, 1], 1, 1.0, Handing(empty=1.0, submit=0.5))
    assert (seconds, working, empty) == (4.5, pytest.approx(2 / 4.5), pytest.approx(2 / 4.5))
