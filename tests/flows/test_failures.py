"""Which failures are worth another try, and what the log keeps of them."""

import logging
import sys
from typing import Any

import pytest

from pipeline.errors import CalibrationError, ModelError, PipelineError, RecipeError


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def _hub_error(status: int) -> Exception:
    import sys

    from huggingface_hub import get_session
    from huggingface_hub.errors import HfHubHTTPError

    spoken: Any = sys.modules[type(get_session()).__module__.partition(".")[0]]  # httpx or httpx2
    request = spoken.Request("GET", "https://hub.example/api")
    return HfHubHTTPError(f"{status}", response=spoken.Response(status, request=request))


def _offline() -> Exception:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return OfflineModeIsEnabled("offline by choice")


CASES = {
    "connection broke": (lambda: ConnectionResetError("reset"), True),
    "timeout": (lambda: TimeoutError("slow"), True),
    "download of a model broke off": (lambda: _caused(ModelError("x"), ConnectionError("reset")), True),
    "dataset's server is overloaded": (lambda: _caused(CalibrationError("x"), _hub_error(503)), True),
    "too many requests": (lambda: _hub_error(429), True),
    "not found": (lambda: _caused(ModelError("x"), _hub_error(404)), False),
    "not allowed": (lambda: _hub_error(403), False),
    "offline by choice": (lambda: _caused(ModelError("x"), _offline()), False),
    "wrong recipe": (lambda: RecipeError("x"), False),
    "wrong file": (lambda: _caused(ModelError("x"), FileNotFoundError("gone")), False),
    "bug": (lambda: KeyError("x"), False),
}


@pytest.mark.parametrize("name", CASES)
def test_which_failures_a_retry_may_help(name: str) -> None:
    from flows.failures import is_network_failure

    build, expected = CASES[name]
    assert is_network_failure(build()) is expected


@pytest.mark.parametrize(
    ("error", "num_tries"),
    [(_caused(ModelError("the download broke off"), ConnectionError("reset")), 3), (RecipeError("wrong"), 1)],
    ids=["network", "recipe"],
)
def test_prepare_is_tried_again_only_for_the_network(
    server: None, monkeypatch: pytest.MonkeyPatch, error: Exception, num_tries: int
) -> None:
    from prefect import flow

    from flows import steps

    tries = []

    def fail(*arguments: Any) -> Any:
        tries.append(arguments)
        raise error

    monkeypatch.setattr(steps, "prepare_job", fail)
    prepare = steps.prepare.with_options(retry_delay_seconds=0)

    @flow
    def only_prepare() -> Any:
        return prepare({}, None, "registry", "out", "name", "cpu", "threads", True)

    with pytest.raises(PipelineError, match=str(error)):
        only_prepare()
    assert len(tries) == num_tries


def test_a_hub_that_is_away_fails_a_run_within_two_minutes() -> None:
    from flows import quality, release, steps
    from pipeline.sources import HUB_TIMEOUT_SECONDS

    for task in (steps.prepare, release.look, quality.measure):
        waits = sum(task.retry_delay_seconds) * (1 + task.retry_jitter_factor)
        assert waits + (1 + task.retries) * 2 * HUB_TIMEOUT_SECONDS < 120
    assert release.push.retries == 0  # see registry/patience.py


@pytest.mark.parametrize(("error", "kept"), [(RecipeError("wrong"), False), (KeyError("bug"), True)])
@pytest.mark.parametrize("name", ["prefect.task_runs", "prefect.flow_runs"])
def test_traceback_of_a_known_error_is_not_logged(name: str, error: Exception, kept: bool) -> None:
    import flows.steps  # noqa: F401  installs the filter

    try:
        raise error
    except (RecipeError, KeyError):
        record = logging.LogRecord(name, logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    assert bool(logging.getLogger(name).filter(record)) is kept
