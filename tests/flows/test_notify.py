"""Who is told, of what, and that the URL stays a secret."""

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.flows.webhook_server import WebhookServer


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebhookServer]:
    from flows import notify

    monkeypatch.setattr(notify, "SECONDS_BETWEEN_TRIES", 0.0)
    with WebhookServer() as listening:
        monkeypatch.setenv("BITSMITH_WEBHOOK", listening.url)
        yield listening


def test_a_failed_run_is_told_once_with_its_message(server: str, webhook: WebhookServer) -> None:
    from prefect import flow

    from flows.notify import WATCHED
    from pipeline.errors import RecipeError

    @flow(name="inner", **WATCHED)
    def inner() -> None:
        raise RecipeError("seed is wrong")

    @flow(name="outer", flow_run_name="tonight", **WATCHED)
    def outer() -> None:
        inner()

    assert outer(return_state=True).is_failed()
    (told,) = webhook.received
    assert (told["flow"], told["run"], told["state"]) == ("outer", "tonight", "Failed")
    assert "seed is wrong" in told["message"]
    assert told["text"].startswith("outer tonight: Failed. ")


def test_a_crashed_run_is_told(server: str, webhook: WebhookServer) -> None:
    from prefect import flow

    from flows.notify import WATCHED

    @flow(name="dying", **WATCHED)
    def dying() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        dying()
    assert [told["state"] for told in webhook.received] == ["Crashed"]


def test_skipped_and_done_are_told_to_nobody(server: str, webhook: WebhookServer) -> None:
    from prefect import flow

    from flows.notify import WATCHED
    from flows.states import skipped

    @flow(name="idle", **WATCHED)
    def idle() -> Any:
        return skipped("nothing is new")

    state = idle(return_state=True)
    assert (state.name, state.is_completed(), state.message) == ("Skipped", True, "nothing is new")
    assert webhook.received == []


def test_a_busy_webhook_is_tried_again(webhook: WebhookServer) -> None:
    from flows.notify import send

    webhook.refusals = 2
    assert send(webhook.url, {"run": "tonight"})
    assert webhook.received == [{"run": "tonight"}]


def test_the_server_may_call_it_for_many_runs_at_once(webhook: WebhookServer) -> None:
    """The first one that is answered breaks off none of the others."""
    from flows.notify import webhook_block

    async def call() -> None:
        calls = [webhook_block(webhook.url).notify(f'{{"run": "{number}"}}') for number in range(3)]
        await asyncio.gather(*calls)  # type: ignore[arg-type]

    webhook.seconds_to_answer = 0.2
    asyncio.run(call())
    assert sorted(told["run"] for told in webhook.received) == ["0", "1", "2"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/T0PS3CRET", "no url T0PS3CRET", "http://127.0.0.1:9/T0PS3CRET 2"])
def test_one_that_is_gone_stops_nobody_and_its_url_is_not_logged(
    webhook: WebhookServer, url: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    from flows.notify import send

    with caplog.at_level(logging.DEBUG):
        assert not send(url, {"run": "tonight"})
    assert WebhookServer.SECRET not in caplog.text + "".join(capfd.readouterr())


def test_nothing_is_told_to_anybody_by_default() -> None:
    """Importing the package is enough; with no setting in the environment."""
    code = (
        "import flows, os; from prefect.settings import get_current_settings as now; "
        "print(os.environ['DO_NOT_TRACK'], now().server.analytics_enabled, now().flows.heartbeat_frequency)"
    )
    names = ("DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY")
    import os

    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False", "30"]
