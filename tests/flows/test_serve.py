"""`python -m flows serve` as a process: its own server, a schedule, runs, and an end that leaves nothing behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml


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
        _wait(lambda: "Finished in state Completed()" in log.read_text(errors="replace"), log, process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server is still there"
    assert (tmp_path / "prefect" / "prefect.db").is_file()
    assert (tmp_path / "prefect" / "concurrency_leases").is_dir()


def _wait(is_so, log: Path, process: "subprocess.Popen[bytes]") -> None:
    give_up_at = time.monotonic() + 400
    while time.monotonic() < give_up_at:
        assert process.poll() is None, log.read_text(errors="replace")
        if is_so():
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text(errors="replace"))
