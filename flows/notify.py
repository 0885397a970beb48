"""A message to a webhook when a gate refuses, or a run fails, crashes or is cancelled.

The URL is in BITSMITH_WEBHOOK, or else in the server's block `bitsmith-webhook`, where `python -m flows deploy` puts
it. It is a secret, as whoever knows it can write there: it stands in no log, no message and no parameter.

The message is JSON with `text`, which Slack, Mattermost and others show, and `flow`, `run`, `state`, `message` and
`url`, the page of the run.
"""

import json
import os
import time
import urllib.request
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from prefect.blocks.webhook import Webhook
from prefect.logging import get_logger
from prefect.settings import PREFECT_API_URL
from prefect.utilities.urls import url_for

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun
    from prefect.states import State

VARIABLE, BLOCK = "BITSMITH_WEBHOOK", "bitsmith-webhook"
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


def webhook_url() -> str | None:
    """None if nobody wants to be told."""
    if url := os.environ.get(VARIABLE):
        return url
    if not PREFECT_API_URL.value():
        return None
    try:
        return str(Webhook.load(BLOCK).url.get_secret_value())  # type: ignore[union-attr]
    except ValueError:  # there is no such block
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
