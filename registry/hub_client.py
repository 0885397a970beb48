"""The HTTP client of huggingface_hub, one for a process: nothing that it sends waits without a limit.

Most of its calls ask for none (`timeout=None`, said in each, so a client's default would not help), and a server that
takes connections and says nothing would hold a process for good. A refused connection makes huggingface_hub close the
client and make another: so it is the factory of clients that is changed.
"""

import functools
from collections.abc import Iterator
from typing import Any

SECONDS_TO_CONNECT = 10.0
MOST_SECONDS_SILENT = 55.0  # a commit of many files takes the server some time; two tries take less than two minutes


def is_for_now(status: int) -> bool:
    """Does a server that answers so mean: not now, perhaps in a minute?"""
    return status in (408, 429) or status >= 500


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from or while, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@functools.cache
def limit_waits() -> None:
    """From now on, in this process; again, it does nothing."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    make_client = _http._GLOBAL_CLIENT_FACTORY  # the caller's own, if it has set one

    def limited() -> Any:
        client = make_client()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "request": [*hooks["request"], _limit_wait]}
        return client

    set_client_factory(limited)


def _limit_wait(request: Any) -> None:
    limits = {"connect": SECONDS_TO_CONNECT} | dict.fromkeys(("read", "write", "pool"), MOST_SECONDS_SILENT)
    asked = {name: seconds for name, seconds in request.extensions.get("timeout", {}).items() if seconds is not None}
    request.extensions["timeout"] = limits | asked
