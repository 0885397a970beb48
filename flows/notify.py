"""A message to a webhook when a gate refuses, or a run fails, crashes or is cancelled.

The URL is in BITSMITH_WEBHOOK, or else in the server's block `bitsmith-webhook`, where `python -m flows deploy` puts
it. It is a secret, as whoever knows it can write there: it stands in no message, no parameter and no log but
the server's own, where a webhook answered the server with an error.

The message is JSON with `text`, which Slack, Mattermost and others show, and `flow`, `run`, `state`, `message` and
`url`, the page of the run.
"""

import json
import os
import time
import urllib.request
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from prefect.blocks.fields import SecretDict
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.logging import get_logger
from prefect.settings import PREFECT_API_URL
from prefect.utilities.urls import url_for

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun
    from prefect.states import State

VARIABLE, BLOCK, _SECRET = "BITSMITH_WEBHOOK", "bitsmith-webhook", "address"
TRIES, SECONDS_BETWEEN_TRIES, TIMEOUT_SECONDS = 3, 2.0, 10.0


def tell(flow: "Flow[..., Any]", flow_run: "FlowRun", state: "State[Any]") -> None:
    """Prefect's hook for failed, crashed and cancelled runs; a run inside another one leaves it to that one."""
    if flow_run.parent_task_run_id is not None or (url := webhook_url()) is None:
        return
    message = state.message or ""
    content = {
        "text": f"{flow.name} {flow_run.name}: {state.name}. {message}",
        "flow": flow.name,
        "run": flow_run.name,
        "state": state.name,
        "message": message,
        "url": url_for(flow_run),
    }
    send(url, content)


WATCHED: dict[str, Any] = {
    "persist_result": False,
    "on_failure": [tell],
    "on_crashed": [tell],
    "on_cancellation": [tell],
}


def webhook_block(url: str) -> CustomWebhookNotificationBlock:
    """What the server calls it with; the body is the whole message.

    Prefect's `Webhook` would be the plain choice, but all of its kind share their connections: of calls at the same
    time, as when a machine is gone with all its runs, the first one that is answered breaks off the others.
    """
    return CustomWebhookNotificationBlock(
        name="bitsmith",
        url=f"{{{{{_SECRET}}}}}",
        form_data="{{body}}",
        headers={"Content-Type": "application/json"},
        cookies=None,
        timeout=TIMEOUT_SECONDS,
        secrets=SecretDict({_SECRET: url}),
    )


def webhook_url() -> str | None:
    """None if nobody wants to be told."""
    if url := os.environ.get(VARIABLE):
        return url
    if not PREFECT_API_URL.value():
        return None
    try:
        return str(CustomWebhookNotificationBlock.load(BLOCK).secrets.get_secret_value()[_SECRET])  # type: ignore[union-attr]
    except (ValueError, KeyError):  # there is no such block, or one of somebody else's making
        return None


def send(url: str, content: dict[str, Any]) -> bool:
    """Post it, a few times if need be; what goes wrong is logged without the URL, and stops nobody."""
    body, headers, problem = json.dumps(content).encode(), {"Content-Type": "application/json"}, ""
    for number in range(TRIES):
        time.sleep(SECONDS_BETWEEN_TRIES * bool(number))
        try:
            request = urllib.request.Request(url, body, headers, method="POST")
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
                return True
        except (OSError, ValueError, HTTPException) as error:  # an InvalidURL says the whole of it: not told
            problem = f"{type(error).__name__} {getattr(error, 'code', '')}".strip()
    get_logger("flows").warning("The webhook did not take the message about %s (%s).", content.get("run"), problem)
    return False
