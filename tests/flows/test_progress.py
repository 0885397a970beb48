"""Lines that come neither too often nor too rarely, and a bar where a server shows it."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def advance(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that stands still unless told."""
    from flows import progress

    now = [0.0]

    class Clock:
        monotonic = staticmethod(lambda: now[0])

    monkeypatch.setattr(progress, "time", Clock)

    def step(seconds: float) -> None:
        now[0] += seconds

    return step


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines, in the place of showing them."""
    from flows.progress import RunDisplay

    lines: list[str] = []
    monkeypatch.setattr(RunDisplay, "__call__", lambda self, said: lines.append(said.line))
    return lines


def _work(advance: Callable[[float], None], seconds: float, num_items: int, **options: Any) -> list[int]:
    from flows.progress import RunProgress

    done = []
    for item in RunProgress().track(range(num_items), "Work", **options):
        advance(seconds)
        done.append(item)
    return done


def test_slow_work_has_a_line_a_tenth_and_an_estimate(advance: Callable[[float], None], said: list[str]) -> None:
    assert _work(advance, 2.0, 100, total=100) == list(range(100))
    assert said[0] == "Work: 5% (5 of 100), about 0:03:10 left"  # ten seconds of silence come before a tenth
    assert said[-1] == "Work: 100 of 100 in 0:03:20"
    assert len(said) == 20


def test_a_tenth_comes_before_ten_seconds(advance: Callable[[float], None], said: list[str]) -> None:
    _work(advance, 0.2, 100, total=100)
    assert said[0] == "Work: 10% (10 of 100), about 0:00:18 left"
    assert len(said) == 10


def test_fast_work_has_its_last_line_only(advance: Callable[[float], None], said: list[str]) -> None:
    _work(advance, 0.01, 20, total=20)
    assert said == ["Work: 20 of 20 in 0:00:00"]


def test_what_was_done_before_does_not_shorten_the_estimate(advance: Callable[[float], None], said: list[str]) -> None:
    _work(advance, 10.0, 20, total=100, done=80)
    assert said[0] == "Work: 81% (81 of 100), about 0:03:10 left"


def test_unknown_total_is_counted(advance: Callable[[float], None], said: list[str]) -> None:
    _work(advance, 10.0, 2)
    assert said == ["Work: 1 done in 0:00:10", "Work: 2 done in 0:00:20", "Work: 2 of 2 in 0:00:20"]


def test_nothing_to_do_is_said_without_dividing_by_it(advance: Callable[[float], None], said: list[str]) -> None:
    _work(advance, 1.0, 0, total=0)
    assert said == ["Work: 0 of 0 in 0:00:00"]


def test_no_run_and_no_server_is_fine() -> None:
    from flows.progress import RunProgress

    assert list(RunProgress().track([1, 2], "Work", total=2)) == [1, 2]


def test_bar_is_filled_on_the_server(server: None, advance: Callable[[float], None]) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run

    @flow
    def work() -> str:
        _work(advance, 11.0, 4, total=4)
        return str(flow_run.id)

    run_id = work()
    with get_client(sync_client=True) as client:
        bars = [bar for bar in client.read_artifacts() if str(bar.flow_run_id) == run_id]
    assert [(bar.type, bar.data, bar.description) for bar in bars] == [("progress", 100.0, "Work")]
