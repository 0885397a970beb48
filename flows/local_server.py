"""A Prefect server of one's own, as a process on this machine: API, schedules, automations and the pages to watch.

Its database is SQLite in PREFECT_HOME (~/.prefect), and what it notes of slots in use lies beside that, so that a
server which was killed finds both again.
"""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from flows.errors import DeployError

SETTINGS = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
START_SECONDS = 180.0


def is_answering(api_url: str) -> bool:
    """Is a Prefect server there?"""
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=5) as answer:
            return bool(answer.read().strip() == b"true")
    except (OSError, ValueError):
        return False


def start_server(api_url: str, log: Path) -> subprocess.Popen[bytes]:
    """Start one and wait until it answers.

    Args:
        api_url: such as http://127.0.0.1:4200/api; the host must be this machine's.
        log: what the server prints goes there.
    Raises:
        DeployError: it ended, or did not answer in time.
    """
    place = urlsplit(api_url)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", str(place.hostname)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, "--port", str(place.port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | SETTINGS | {"PREFECT_API_URL": api_url},
        )
    give_up_at = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up_at and process.poll() is None:
        if is_answering(api_url):
            return process
        time.sleep(0.2)
    process.kill()
    raise DeployError(
        f"The Prefect server at {api_url} did not start. {log} tells why; is the port in use by something else? "
        "Choose another one with --port."
    )
