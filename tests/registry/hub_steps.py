"""Push and pull with the test server, once and without waiting, unless a test says otherwise."""

import sys
from pathlib import Path

from registry import PullResult, PushResult, Registry, Version, pull, push
from registry.patience import ONCE

sys.path.insert(0, str(Path(__file__).parent))
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer

REPO = "alice/tiny-3bpw"
CARD = "---\nlicense: apache-2.0\n---\n# Tiny, three bits\n"


def send(registry: Registry, hub: HubServer, reference: str = "tiny", **changes) -> PushResult:
    settings = {"card": CARD, "endpoint": hub.endpoint, "token": WRITE_TOKEN, "patience": ONCE} | changes
    return push(registry, reference, REPO, **settings)


def fetch_whole(registry: Registry, hub: HubServer, **changes) -> PullResult:
    settings = {"endpoint": hub.endpoint, "token": READ_TOKEN, "patience": ONCE} | changes
    return pull(REPO, registry, **settings)


def fetch(registry: Registry, hub: HubServer, **changes) -> Version:
    return fetch_whole(registry, hub, **changes).version
