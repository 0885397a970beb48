"""`python -m flows serve`: its own server, which is started again when it is gone, a schedule, runs, and its end."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

COMPLETED = "Finished in state Completed()"


@pytest.mark.slow
def test_serve_starts_a_server_runs_by_schedule_and_ends(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    entry = {
        "name": "tidy",
        "entrypoint": "flows.collect_garbage.collect_garbage",
        "parameters": {"registry": str(tmp_path / "registry")},
        "schedule": {"interval": 5},
    }
    file = tmp_path / "prefect.yaml"
    file.write_text(yaml.safe_dump({"deployments": [entry]}), encoding="utf-8")
    environment = os.environ | {"PREFECT_HOME": str(tmp_path / "prefect")}
    del environment["PREFECT_API_URL"]
    command = [sys.executable, "-m", "flows", "serve", "--file", str(file), "--port", str(port)]
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait(lambda: COMPLETED in log.read_text(errors="replace"), log, process)
        (server,) = [each for each in psutil.Process(process.pid).children() if "server" in each.cmdline()]
        server.kill()
        _wait(lambda: "is started again" in log.read_text(errors="replace"), log, process)
        said = len(log.read_text(errors="replace"))
        _wait(lambda: COMPLETED in log.read_text(errors="replace")[said:], log, process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server is still there"
    assert (tmp_path / "prefect" / "prefect.db").is_file()
    assert (tmp_path / "prefect" / "concurrency_leases").is_dir()


def test_a_server_that_is_gone_is_started_again_until_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import local_server

    started: list[subprocess.Popen[bytes]] = []

    def launch(api_url: str, log: Path) -> "subprocess.Popen[bytes]":
        started.append(subprocess.Popen(["sleep", "600"]))
        return started[-1]

    monkeypatch.setattr(local_server, "_launch", launch)
    monkeypatch.setattr(local_server, "is_answering", lambda api_url: True)
    monkeypatch.setattr(local_server, "SECONDS_BETWEEN_LOOKS", 0.01)
    with local_server.kept_server("http://127.0.0.1:9/api", tmp_path / "log"):
        for number in range(2):
            started[number].kill()
            give_up_at = time.monotonic() + 60
            while len(started) < number + 2 and time.monotonic() < give_up_at:
                time.sleep(0.01)
        assert started[2].poll() is None
    assert len(started) == 3
    assert started[2].returncode == -signal.SIGTERM


def test_a_server_whose_start_is_broken_off_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import local_server

    process = subprocess.Popen(["sleep", "600"])

    def stopped(api_url: str) -> bool:
        raise SystemExit(143)

    monkeypatch.setattr(local_server, "_launch", lambda *_: process)
    monkeypatch.setattr(local_server, "is_answering", stopped)
    with pytest.raises(SystemExit):
        local_server.start_server("http://127.0.0.1:9/api", tmp_path / "log")
    assert process.wait(30) == -signal.SIGKILL


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `serve` gives to Prefect, which then finds no server for a while, and gives up in its own way."""
    given: list[Any] = []

    def give_up(*deployments: Any, **_settings: Any) -> None:
        given.extend(deployments)
        raise ExceptionGroup("unhandled errors in a TaskGroup", [RuntimeError("Service exceeded error threshold.")])

    monkeypatch.setattr("flows.serve.server_at_hand", lambda port: nullcontext())
    monkeypatch.setattr("flows.serve.make_automations", lambda webhook: [])
    monkeypatch.setattr("flows.serve.collapse_late_runs", lambda client, deployments: 0)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    monkeypatch.setattr("prefect.serve", give_up)
    return given


def test_a_server_that_stays_away_ends_it_in_one_paragraph(served: list[Any]) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.configuration import Deployment
    from flows.errors import DeployError
    from flows.serve import serve

    tidy = Deployment(name="tidy", entrypoint="flows.collect_garbage.collect_garbage")
    away = temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"})
    with away, pytest.raises(DeployError, match=r"No Prefect server answers at http://127\.0\.0\.1:9/api"):
        serve([tidy], port=9, limit=1)
    assert served[0].tags[-1] == "bitsmith-served"
    assert served[0].job_variables == {}


def _wait(is_so, log: Path, process: "subprocess.Popen[bytes]") -> None:
    give_up_at = time.monotonic() + 400
    while time.monotonic() < give_up_at:
        assert process.poll() is None, log.read_text(errors="replace")
        if is_so():
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text(errors="replace"))
