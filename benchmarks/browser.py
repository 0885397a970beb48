"""Pictures of web pages by Chromium without a window (apt-get install chromium), over its DevTools protocol."""

import base64
import io
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from websockets.sync.client import ClientConnection, connect

MISSING = "no Chromium is installed (apt-get install chromium)"
SECONDS_TO_START = 60.0
NUM_COLORS = 64


class Page:
    """One tab."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection, self._number = connection, 0

    def resize(self, width: int, height: int) -> None:
        """The window, in pixels."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, url: str, seconds: float) -> None:
        """Go there, and wait until it has asked for all it shows and has come to rest."""
        self._call("Page.navigate", url=url)
        time.sleep(seconds)

    def click(self, text: str, seconds: float) -> None:
        """On what says exactly that, and wait."""
        elements = "[...document.querySelectorAll('*')].filter(each => each.children.length == 0)"
        script = f"{elements}.find(each => each.textContent.trim() == {json.dumps(text)}).click()"
        self._call("Runtime.evaluate", expression=script)
        time.sleep(seconds)

    def save(self, path: Path) -> None:
        """What the window shows, as a PNG of few colours."""
        image = Image.open(io.BytesIO(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])))
        image.convert("RGB").quantize(NUM_COLORS, dither=Image.Dither.NONE).save(path, optimize=True)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._connection.recv(timeout=60))
            if answer.get("id") == self._number:
                return answer.get("result", {})


@contextmanager
def browser(width: int, height: int) -> Iterator[Page]:
    """A Chromium with one tab of that many pixels."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert program is not None, MISSING
    with tempfile.TemporaryDirectory(prefix="bitsmith-browser-", ignore_cleanup_errors=True) as profile:
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--window-size={width},{height}", f"--user-data-dir={profile}", "--remote-debugging-port=0"]
        process = subprocess.Popen([*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with connect(_address(Path(profile)), max_size=None, proxy=None) as connection:
                page = Page(connection)
                page._call("Page.enable")
                page.resize(width, height)
                yield page
        finally:
            process.terminate()
            process.wait(30)


def _address(profile: Path) -> str:
    """Of the tab's socket."""
    port_file, give_up_at = profile / "DevToolsActivePort", time.monotonic() + SECONDS_TO_START
    while time.monotonic() < give_up_at:
        if port_file.exists() and len(lines := port_file.read_text().splitlines()) == 2:
            with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json", timeout=10) as answer:
                tabs = json.load(answer)
            if found := [tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"]:
                return str(found[0])
        time.sleep(0.2)
    raise SystemExit("Chromium did not start.")
