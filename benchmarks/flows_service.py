"""A Prefect server, a worker and deployments as docs/operating.md has them: processes to kill, and HTTP to ask.

All of it lives in one folder. A process belongs to the service if its environment names that folder, and to a run if it
names the run too; so what a kill left behind is found whoever its parent is by now.
"""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from flows.local_server import start_server

ROOT = Path(__file__).parents[1]
POOL = "bitsmith-cpu"
RUN_ID = "PREFECT__FLOW_RUN_ID"
SPAWNED = "--multiprocessing-fork"  # in the command of a process that multiprocessing starts anew
SECONDS_TO_READ, SECONDS_TO_CHANGE = 300.0, 60.0
FORKING = "multiprocessing.forkserver"  # in the command of the process that children are forked from, and in theirs


class Service:
    """Nothing runs before `start_server`.

    Attributes:
        url: of the server's API.
    """

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}/api"
        self._folder = folder
        self._environment = {
            "BITSMITH_HOME": str(folder / "bitsmith"),
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
            "PREFECT_API_URL": self.url,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        os.environ.update(self._environment)
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    # Processes

    def start_server(self) -> None:
        """Start it, or start it again where its database is."""
        self._started["server"] = start_server(self.url, self._folder / "server.log")

    def start_worker(self) -> None:
        """Start one, where none is alive."""
        old = self._started.get("worker")
        if old is not None and old.poll() is None:
            return
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL]
        with (self._folder / "worker.log").open("ab") as output:
            self._started["worker"] = subprocess.Popen(
                command, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def kill(self, name: str) -> None:
        """`kill -9` of the server or the worker itself, and of nothing below it."""
        self._started[name].kill()
        self._started[name].wait()

    def processes_of(self, run_id: str) -> list[psutil.Process]:
        """The run's own, and all that it started."""
        return [process for process, environment in self._ours() if environment.get(RUN_ID) == run_id]

    def children_of(self, run_id: str) -> list[psutil.Process]:
        """What is at work for the run outside of its own process, but for Dask's workers."""
        forking = [process for process in self.processes_of(run_id) if _says(process, FORKING)]
        parents = {process.pid for process in forking}
        return [process for process in forking if _parent(process) in parents]

    def dask_workers_of(self, run_id: str) -> list[psutil.Process]:
        """The processes of the run's Dask cluster."""
        return [process for process in self.processes_of(run_id) if _says(process, SPAWNED)]

    def left_over(self) -> list[str]:
        """Commands of processes that are neither the server nor the worker."""
        known = {process.pid for process in self._started.values()}
        return [" ".join(_command(process)) for process, _ in self._ours() if process.pid not in known]

    def stop(self) -> None:
        """End all that belongs to the service."""
        for name in self._started:
            self.kill(name)
        while left := [process for process, _ in self._ours()]:
            for process in left:
                kill_one(process)

    def _ours(self) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:  # somebody else's, or gone just now
                continue
            if environment.get("PREFECT_HOME") == self._environment["PREFECT_HOME"] and process.pid != os.getpid():
                yield process, environment

    # What the server is asked, or told

    def deploy(self, entries: Sequence[dict[str, Any]]) -> None:
        """`python -m flows deploy` of a file with these deployments."""
        file = self._folder / "prefect.yaml"
        file.write_text(yaml.safe_dump({"deployments": list(entries)}), encoding="utf-8")
        subprocess.run(
            [sys.executable, "-m", "flows", "deploy", "--file", str(file)], check=True, stdout=subprocess.DEVNULL
        )

    def trigger(self, deployment: str) -> str:
        """A new run of "flow/name"; its id."""
        found = self.ask(f"deployments/name/{deployment}")
        return str(self.ask(f"deployments/{found['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"])

    def state(self, run_id: str) -> dict[str, Any]:
        """Of a run."""
        state: dict[str, Any] = self.ask(f"flow_runs/{run_id}")["state"]
        return state

    def tasks(self, run_id: str, state: str) -> list[str]:
        """Names of the run's tasks that are in the state, such as "RUNNING", without the budget."""
        wanted = {"flow_runs": {"id": {"any_": [run_id]}}, "task_runs": {"state": {"type": {"any_": [state]}}}}
        return [task["name"].partition(" at ")[0] for task in self.ask("task_runs/filter", wanted)]

    def page(self, run_id: str) -> str:
        """What the run shows of itself when it is completed, in Markdown."""
        wanted = {"artifacts": {"flow_run_id": {"any_": [run_id]}, "type": {"any_": ["markdown"]}}}
        return "\n".join(artifact["data"] for artifact in self.ask("artifacts/filter", wanted))

    def taken_slots(self) -> dict[str, float]:
        """Global concurrency limits, those of deployments too, that have a slot taken."""
        limits = self.ask("v2/concurrency_limits/filter", {})
        return {limit["name"]: limit["active_slots"] for limit in limits if limit["active_slots"]}

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET, or POST of a body; a server that is busy or away is asked again.

        For five minutes what only reads, for one what may have been done though no answer came.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        only_reads = body is None or path.endswith("/filter")
        give_up_at = time.monotonic() + (SECONDS_TO_READ if only_reads else SECONDS_TO_CHANGE)
        while True:
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return json.load(answer)
            except (OSError, http.client.HTTPException) as error:  # the latter of an answer that breaks off
                is_refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if is_refused or time.monotonic() > give_up_at:
                    raise
                time.sleep(1)


def kill_one(process: psutil.Process) -> bool:
    """`kill -9`; False if it was gone already."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def _says(process: psutil.Process, words: str) -> bool:
    return any(words in part for part in _command(process))


def _parent(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return 0


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
