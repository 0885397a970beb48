"""A stage in a child process: its figures, its progress and its death, as the parent shows them."""

import os
import signal
from contextlib import nullcontext
from typing import Any

import pytest

from pipeline.errors import ModelError, WorkerError


@pytest.fixture(scope="module")
def job(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    from flows.job import prepare_job

    folder = tmp_path_factory.mktemp("job")
    unweighted = recipe | {"sensitivity": "none", "eval_windows": 0}
    return prepare_job(unweighted, str(folder / "registry"), str(folder / "out"), "tiny", "cpu", "threads", True)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the parent shows."""
    from flows.progress import RunDisplay

    shown: list[str] = []
    monkeypatch.setattr(RunDisplay, "__call__", lambda self, said: shown.append(said.line))
    return shown


def _leave_pid(run: Any, job: Any, *inputs: Any) -> Any:
    bytearray(b"x") * 400_000_000
    run.progress.say(f"in process {os.getpid()} with {[done['name'] for done in inputs]}")
    for _ in run.progress.track(range(3), "Work", total=3):
        pass
    return None


def _die_at_work(run: Any, job: Any) -> Any:
    for _ in run.progress.track(["one"], "Work", total=1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at_once(run: Any, job: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _lose_the_network(run: Any, job: Any) -> Any:
    raise ModelError("the download broke off") from ConnectionResetError("reset by peer")


def test_a_stage_runs_in_a_child_and_its_progress_and_figures_come_here(job: Any, lines: list[str]) -> None:
    from flows.job import Done
    from flows.stage import do

    none = {"forecast_seconds": None, "forecast_memory_bytes": None, "forecast_device_bytes": None, "digest": None}
    before = Done(name="statistics", seconds=0.0, peak_memory_bytes=0, device_peak_bytes=0, reused=True, **none)
    done = do(job, "work", _leave_pid, before)
    assert (done["name"], done["digest"], done["reused"]) == ("work", None, False)
    assert done["peak_memory_bytes"] > 400_000_000
    (said,) = [line for line in lines if line.startswith("in process")]
    assert said.endswith("with ['statistics']")
    assert int(said.split()[2]) != os.getpid()
    assert lines[-1].startswith("Work: 3 of 3 in ")


def test_a_stage_whose_process_is_killed_is_named_with_what_it_was_doing(job: Any, lines: list[str]) -> None:
    from flows.stage import do

    with pytest.raises(WorkerError, match="Out of memory in recover, Work: the process was killed"):
        do(job, "recover", _die_at_work)
    with pytest.raises(WorkerError, match="Out of memory in decompose: the process was killed"):
        do(job, "decompose", _die_at_once)


def test_what_a_network_did_in_a_child_may_be_tried_again(job: Any, lines: list[str]) -> None:
    from flows.failures import is_network_failure
    from flows.stage import do

    with pytest.raises(ModelError, match="the download broke off") as raised:
        do(job, "evaluate", _lose_the_network)
    assert is_network_failure(raised.value)


@pytest.mark.parametrize(
    ("spread", "runner", "device", "is_by_child"),
    [
        ("matrices", "threads", "cpu", False),
        ("matrices", "threads", "cuda", True),  # which spreads them over the GPUs
        ("matrices", "dask", "cuda", False),
        ("windows", "threads", "cpu", True),
        ("windows", "dask", "cpu", False),
        (None, "dask", "cpu", True),
    ],
)
def test_what_is_spread_over_workers(
    spread: Any, runner: str, device: str, is_by_child: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import stage

    asked = []

    class Child:
        def call(self, *_arguments: Any, **_named: Any) -> dict[str, Any]:
            asked.append(True)
            return {}

    def measured(*_arguments: Any) -> dict[str, Any]:
        asked.append(False)
        return {}

    monkeypatch.setattr(stage, "borrowed_child", lambda: nullcontext(Child()))
    monkeypatch.setattr(stage, "_measured", measured)
    some_job: Any = {"runner": runner, "device": device}
    stage.do(some_job, "costs", lambda *_: None, spread=spread)  # type: ignore[arg-type]
    assert asked == [is_by_child]
