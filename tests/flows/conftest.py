"""One Prefect server for all flow tests: starting it takes most of their time. Its home is the test's own.

Prefect reads its settings when it is first imported, so tests import it, and `flows`, inside functions.
"""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.small import SMALL


@pytest.fixture(scope="session", autouse=True)
def api_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the server is, once a test asks for it. No test touches ~/.prefect or tells anybody that it ran."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/api"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        patch.setenv("PREFECT_API_URL", url)
        patch.delenv("BITSMITH_WEBHOOK", raising=False)  # an operator's own
        patch.setenv("DO_NOT_TRACK", "1")
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        patch.setenv("PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY", "PT1S")  # for silent runs it looks every 5 s
        yield url


@pytest.fixture(scope="session", autouse=True)
def _quick_children(api_url: str) -> Iterator[None]:
    """One that waits for the next test's call, too: starting one takes most of what it does for a tiny model."""
    from flows import child
    from tests.flows.quick_child import serve

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "_serve", serve)
        yield
        child.close_idle()


@pytest.fixture(scope="session")
def server(api_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server process with all its services, as `python -m flows serve` starts it; gives the URL of its API."""
    from flows.local_server import start_server

    log = tmp_path_factory.mktemp("server") / "log.txt"
    process = start_server(api_url, log)
    yield api_url
    _send_what_is_left()
    process.terminate()
    process.wait(30)


def _send_what_is_left() -> None:
    """Logs and events of the tests: sent to a server that is gone, they would be tried for a minute."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.instance().drain()
    EventsWorker.drain_all()


@pytest.fixture(scope="session")
def recipe(tiny_model_dir: Path) -> dict[str, Any]:
    """Small in everything; a flow's parameter, not yet a checked `Recipe`."""
    return {
        "model": str(tiny_model_dir),
        "budget": "4.5bpw",
        "dataset": SMALL["dataset"],
        "eval_dataset": SMALL["eval_dataset"],
        "ranks": [4],
        "candidates": ["nf4-g64-s8", "nf3-g64-s8", "nf2-g64-s8"],
        "num_samples": 2,
        "seq_len": 32,
        "eval_windows": 2,
        "eval_seq_len": 32,
    }


@pytest.fixture
def damaged_model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with one weight that is not a number."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
