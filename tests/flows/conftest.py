"""One Prefect server for all flow tests: starting it takes most of their time. Its home is the test's own.

Prefect reads its settings when it is first imported, so tests import it, and `flows`, inside functions.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.small import SMALL


@pytest.fixture(scope="session", autouse=True)
def _own_prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test touches ~/.prefect or tells anybody that it ran."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        patch.setenv("DO_NOT_TRACK", "1")
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        yield


@pytest.fixture(scope="session")
def server(_own_prefect_home: None) -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield


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
