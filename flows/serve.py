"""serve(): everything on one machine: a server with SQLite if there is none, the deployments, and what runs them.

One process to keep alive, by systemd or any other means; stopped and started again it finds all that was there.
"""

import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import prefect
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.automations import make_automations
from flows.configuration import Deployment
from flows.deploy import check_registries, runner_deployment
from flows.errors import DeployError
from flows.late import collapse_late_runs
from flows.local_server import is_answering, kept_server
from flows.named_server import check_server
from flows.notify import VARIABLE
from flows.version import SERVED

HOST = "127.0.0.1"


def serve(deployments: Sequence[Deployment], *, port: int, limit: int) -> None:
    """Run the deployments by their schedules until stopped.

    Args:
        port: of the server that is started where PREFECT_API_URL names none.
        limit: runs at a time.
    Raises:
        DeployError: the server that PREFECT_API_URL names does not answer, now or for minutes later on; none can be
            started; a registry whose database does not answer.
    """
    check_registries(deployments)
    with server_at_hand(port):
        make_automations(os.environ.get(VARIABLE))
        made = [runner_deployment(deployment) for deployment in deployments]
        for each in made:
            each.work_queue_name, each.job_variables = None, {}  # there are no workers
            each.tags.append(SERVED)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Prefect ends runs in its own way
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            with get_client(sync_client=True) as client:
                collapse_late_runs(client, made)
            prefect.serve(*made, pause_on_shutdown=False, limit=limit)
        except Exception:  # Prefect gives up after some minutes without a server
            check_server()
            raise


@contextmanager
def server_at_hand(port: int) -> Iterator[str]:
    """The server that PREFECT_API_URL names; or one that listens on this machine's `port`, started if it must be.

    One that is started here is started again whenever it is gone.
    """
    if PREFECT_API_URL.value():
        yield check_server()
        return
    url = f"http://{HOST}:{port}/api"
    is_there = is_answering(url)  # one of before whose parent was killed goes on
    if not is_there:
        _check_port(port)
    with nullcontext() if is_there else kept_server(url, PREFECT_HOME.value() / "server.log"):
        os.environ["PREFECT_API_URL"] = url  # for the processes of runs
        try:
            with temporary_settings({PREFECT_API_URL: url}):
                yield url
        finally:
            del os.environ["PREFECT_API_URL"]


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise DeployError(
                f"Something that is no Prefect server listens on port {port} of this machine. Choose another one with "
                "--port."
            )
