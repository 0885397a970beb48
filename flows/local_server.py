"""A Prefect server of one's own, as a process on this machine: API, schedules, automations and the pages to watch.

Its database is SQLite in PREFECT_HOME (~/.prefect), and what it notes of slots in use lies beside that, so that a
server which was killed finds both again.
"""

import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from flows.errors import DeployError

SETTINGS = {
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",  # runs leave the database 90 days after their end
}
START_SECONDS, SECONDS_BETWEEN_LOOKS = 180.0, 5.0


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
    process = _launch(api_url, log)
    give_up_at = time.monotonic() + START_SECONDS
    try:
        while time.monotonic() < give_up_at and process.poll() is None:
            if is_answering(api_url):
                return process
            time.sleep(0.2)
    except BaseException:  # a signal, too
        process.kill()
        raise
    process.kill()
    raise DeployError(
        f"The Prefect server at {api_url} did not start. {log} tells why; is the port in use by something else? "
        "Choose another one with --port."
    )


@contextmanager
def kept_server(api_url: str, log: Path) -> Iterator[None]:
    """A server for as long as the context lasts; one that is gone is started again.

    Raises:
        DeployError: as of `start_server`, of the first one.
    """
    from prefect.logging import get_logger

    process, is_over = start_server(api_url, log), threading.Event()

    def keep() -> None:
        nonlocal process
        while not is_over.wait(SECONDS_BETWEEN_LOOKS):
            if process.poll() is not None:
                said = "The Prefect server at %s ended with exit code %s, and is started again. %s may tell why."
                get_logger("flows").warning(said, api_url, process.returncode, log)
                process = _launch(api_url, log)

    keeper = threading.Thread(target=keep, name="keep-server", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        is_over.set()
        keeper.join()
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _launch(api_url: str, log: Path) -> subprocess.Popen[bytes]:
    place = urlsplit(api_url)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", str(place.hostname)]
    log.touch()
    log.chmod(0o600)  # Prefect writes there which address refused a message
    with log.open("ab") as output:
        return subprocess.Popen(
            [*command, "--port", str(place.port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | SETTINGS | {"PREFECT_API_URL": api_url},
        )
