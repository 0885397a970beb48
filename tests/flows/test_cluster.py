"""Workers started again where they fail to start, once for the stages of a run, and named where they are not there."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from pipeline.errors import WorkerError


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Given how many starts fail, what happens to clusters, in the order of it.

    By Prefect's own runner, which enters at once and makes the cluster later.
    """
    import prefect_dask.task_runners

    happened: list[str] = []

    class Client:
        dashboard_link = None

        def __init__(self, cluster: str, **_settings: Any) -> None:
            self.cluster = cluster

        def __enter__(self) -> "Client":
            return self

        def __exit__(self, *_error: object) -> None:
            happened.append("end")

    def failing(num_failures: int) -> list[str]:
        def start(**_settings: Any) -> Any:
            happened.append("start")
            if len(happened) <= num_failures:
                raise RuntimeError("Cluster failed to start: Nanny failed to start.")
            return nullcontext("workers")

        monkeypatch.setattr("distributed.LocalCluster", start)
        return happened

    monkeypatch.setattr(prefect_dask.task_runners, "PrefectDaskClient", Client)
    monkeypatch.setattr(prefect_dask.task_runners, "to_qualified_name", str)
    return failing


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize(("num_failures", "error"), [(1, None), (2, WorkerError)])
def test_workers_that_do_not_start_are_started_again_once(
    starts: Callable[[int], list[str]], num_failures: int, error: type[Exception] | None, is_kept: bool
) -> None:
    from flows.cluster import kept_workers, workers_of
    from flows.runner import Runner

    happened = starts(num_failures)
    refused = pytest.raises(error, match=r"tried twice: .*Nanny failed") if error else nullcontext()
    with kept_workers() if is_kept else nullcontext(), refused, workers_of(Runner.parse("dask:2")) as started:
        assert started.client.cluster == "workers"  # type: ignore[attr-defined]
    assert happened == ["start", "start"] + ["end"] * (error is None)


def test_without_a_run_they_are_there_for_one_stage(starts: Callable[[int], list[str]]) -> None:
    from flows.cluster import end_workers, workers_of
    from flows.runner import Runner

    happened = starts(0)
    for _stage in range(2):
        with workers_of(Runner.parse("dask:2")):
            end_workers()  # ends what is kept: none of them
            assert happened[-1] == "start"
    assert happened == ["start", "end"] * 2


def test_the_stages_of_a_run_share_them(starts: Callable[[int], list[str]]) -> None:
    from flows.cluster import end_workers, kept_workers, workers_of
    from flows.runner import Runner

    happened = starts(0)
    with kept_workers():
        with workers_of(Runner.parse("dask:2")) as first:
            pass
        with workers_of(Runner.parse("dask:2")) as second:
            assert second is first
        with kept_workers(), workers_of(Runner.parse("dask:2")) as inner:  # a run within a run has its own
            assert inner is not first
        assert happened == ["start", "start", "end"]
        end_workers()
        assert happened == ["start", "start", "end", "end"]
        with pytest.raises(ZeroDivisionError), workers_of(Runner.parse("dask:2")):
            raise ZeroDivisionError
    assert happened == ["start", "start", "end", "end", "start", "end"]


@pytest.mark.parametrize("runner", ["threads:2", "dask:tcp://10.0.0.1:8786"])
def test_what_takes_no_time_to_start_is_not_kept(starts: Callable[[int], list[str]], runner: str) -> None:
    """A scheduler elsewhere may be another one by the next stage."""
    from flows.cluster import kept_workers, workers_of
    from flows.runner import Runner

    starts(0)
    with kept_workers():
        with workers_of(Runner.parse(runner)) as first:
            pass
        with workers_of(Runner.parse(runner)) as second:
            assert second is not first


def test_a_cluster_that_is_not_there_is_named_by_its_address() -> None:
    import dask

    from flows.cluster import workers_of
    from flows.runner import Runner

    quickly = dask.config.set({"distributed.comm.timeouts.connect": "500ms"})
    nowhere = pytest.raises(WorkerError, match=r"No dask cluster answers at tcp://127\.0\.0\.1:9 \(Timed out.*Check")
    with quickly, nowhere, workers_of(Runner.parse("dask:tcp://127.0.0.1:9")):
        pass
