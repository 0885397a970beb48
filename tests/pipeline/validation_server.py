"""The Hub's check of a card's header (/api/validate-yaml), on the loopback interface: a few of its rules."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

from pipeline.origin import HUB_LICENSES

REPO_ID = re.compile(r"([\w-]+/)?[\w.-]+")


def faults(header: Any) -> Iterator[str]:
    """What the Hub would object to."""
    if not isinstance(header, dict):
        yield "the header must be a mapping"
        return
    if header.get("license", "mit") not in HUB_LICENSES:
        yield '"license" must be one of the known ones'
    if "license_link" in header and not re.match(r"https?://|[\w.-]+$", header["license_link"]):
        yield '"license_link" must be a URL or a file'
    for repo_id in [*header.get("datasets", []), header.get("base_model", "gpt2")]:
        if not REPO_ID.fullmatch(repo_id):
            yield f"{repo_id!r} is not a repository"
    for model in header.get("model-index", []):
        if not isinstance(model["name"], str) or not model["name"]:
            yield '"model-index[].name" is required'
        for result in model["results"]:
            if not REPO_ID.fullmatch(result["dataset"]["type"]):
                yield '"dataset.type" fails to match the required pattern'
            if not result["task"]["type"] or not result["dataset"]["name"]:
                yield '"task.type" and "dataset.name" are required'
            if not all(metric["type"] and "value" in metric for metric in result["metrics"]):
                yield '"type" and "value" of a metric are required'


class _Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.accepted: list[dict[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/api/validate-yaml"
        assert body["repoType"] == "model"
        header = re.match(r"---\n(.*?)\n---\n", body["content"], flags=re.DOTALL)
        assert header is not None
        content = yaml.safe_load(header[1])
        found = list(faults(content))
        self.server.accepted += [content] if not found else []
        answer = json.dumps({"errors": [{"message": fault} for fault in found], "warnings": []}).encode()
        self.send_response(400 if found else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_arguments: object) -> None:
        pass


@contextmanager
def validation_server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its endpoint, as long as the block lasts, and the headers that it accepts."""
    with _Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", server.accepted
        server.shutdown()
