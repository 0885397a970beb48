"""A registry in a temporary folder with either database, and folders to add to it."""

import json
from pathlib import Path

import pytest

from registry import Artifact, Registry
from registry.settings import RegistrySettings


@pytest.fixture
def registry(tmp_path: Path, database: str | None) -> Registry:
    root = tmp_path / "registry"
    RegistrySettings(database=database).write(root)
    return Registry(root)


@pytest.fixture
def make_folder(tmp_path: Path):
    """make_folder({"a/b.txt": b"..."}) -> a new folder with these files."""
    count = iter(range(1000))

    def make(files: dict[str, bytes]) -> Path:
        folder = tmp_path / f"folder{next(count)}"
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return folder

    return make


@pytest.fixture
def checkpoint(registry: Registry, make_folder) -> Artifact:
    """What a checkpoint looks like: a small text, a file in a folder, and a large binary."""
    files = {
        "config.json": json.dumps({"hidden_size": 64}).encode(),
        "tables/plan.json": b"[1, 2, 3]",
        "model.safetensors": bytes(range(256)) * 64,
    }
    return registry.add_artifact("checkpoint", make_folder(files), ["ab" * 32], {"bits": 3.0})
