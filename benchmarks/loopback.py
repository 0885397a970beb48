"""A Prefect server and a worker as processes on this machine, in a folder of their own, for benchmarks of the flows."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests import postgresql

ROOT = Path(__file__).parents[1]
DATABASES = ("postgresql", "sqlite")


def settle_in(folder: Path, port: int, **settings: str) -> None:
    """Settings of this process and of all that it starts. Prefect reads them when it is imported: call this before.

    Args:
        folder: gets what bitsmith, Prefect and the Hub's client keep.
        settings: environment variables on top.
    """
    os.environ.update(
        {
            "BITSMITH_HOME": str(folder / "bitsmith"),
            "DO_NOT_TRACK": "1",
            "HF_HOME": str(folder / "hf"),
            "OMP_NUM_THREADS": "1",
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        | settings
    )


@contextmanager
def prefect_server(folder: Path, database: str) -> Iterator[str]:
    """The URL of its API, the one of `settle_in`; `database` is one of DATABASES.

    Raises:
        DeployError: it does not start.
    """
    from flows.local_server import start_server

    with ExitStack() as stack:
        if database == "postgresql":
            socket_folder = stack.enter_context(postgresql.server())
            url = postgresql.new_database(socket_folder).replace("postgresql:", "postgresql+asyncpg:")
            os.environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = url
        url = os.environ["PREFECT_API_URL"]
        process = start_server(url, folder / "server.log")
        try:
            yield url
        finally:
            _end(process)


@contextmanager
def worker(folder: Path, pool: str) -> Iterator[Path]:
    """Its log. It works in `folder`."""
    log, command = folder / "worker.log", [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--name", "first"], cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield log
    finally:
        _end(process)


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
