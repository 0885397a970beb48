"""What drills of the flows ask a server that is busy, or was killed a moment ago."""

import os
import threading
import urllib.error
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks import flows_service
from benchmarks.flows_service import Service


class _Server(ThreadingHTTPServer):
    """Gives the answers of its list in turn: a status with a length, and as much of the content as there is."""

    answers: list[tuple[int, int, bytes]]


class _Handler(BaseHTTPRequestHandler):
    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert isinstance(self.server, _Server)
        status, length, content = self.server.answers.pop(0)
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _answer  # noqa: N815

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[_Server]:
    listening = _Server(("127.0.0.1", 0), _Handler)
    threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
    yield listening
    listening.shutdown()
    listening.server_close()


@pytest.fixture
def service(server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr(os, "environ", {**os.environ})  # which a service sets up for good
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    made = Service(tmp_path)
    made.url = f"http://127.0.0.1:{server.server_address[1]}/api"
    return made


BUSY, BROKEN_OFF, GOOD = (503, 0, b""), (200, 99, b'{"st'), (200, 14, b'{"state": "A"}')


def test_what_only_reads_is_asked_until_there_is_a_whole_answer(service: Service, server: _Server) -> None:
    server.answers = [BUSY, BROKEN_OFF, GOOD]
    assert service.state("run") == "A"
    server.answers = [BROKEN_OFF, (200, 2, b"[]")]
    assert service.taken_slots() == {}


def test_patience_is_longer_with_what_only_reads(
    service: Service, server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows_service, "SECONDS_TO_CHANGE", -1.0)
    server.answers = [BUSY, BUSY, GOOD]
    with pytest.raises(urllib.error.HTTPError, match="503"):
        service.ask("deployments/id/create_flow_run", {})
    assert service.ask("flow_runs/filter", {}) == {"state": "A"}


def test_a_refusal_is_final(service: Service, server: _Server) -> None:
    server.answers = [(404, 0, b""), GOOD]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        service.state("run")
