"""A webhook on the loopback interface that keeps what it was told."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WebhookServer:
    """Lives as long as the `with` block.

    Attributes:
        url: with a secret in it, as such URLs have.
        received: the messages, in order.
        refusals: so many requests are answered with 503 first.
        seconds_to_answer: of each request, beside the others.
    """

    SECRET = "T0PS3CRET"

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self.refusals = 0
        self.lock = threading.Lock()
        self.seconds_to_answer = 0.0
        handler = type("BoundHandler", (_Handler,), {"webhook": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/hooks/{self.SECRET}"

    def __enter__(self) -> "WebhookServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    webhook: WebhookServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.webhook.lock:  # requests may come at once
            status = 503 if self.webhook.refusals else 200
            self.webhook.refusals -= bool(self.webhook.refusals)
        if status == 200:
            self.webhook.received.append(json.loads(body))
        time.sleep(self.webhook.seconds_to_answer * len(self.webhook.received))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        pass
