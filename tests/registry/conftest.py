"""A registry in a temporary folder with either database, folders to add, and the servers that it speaks with."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from registry import Artifact, IdentityVerifier, KeylessSigner, Registry, Version
from registry.settings import RegistrySettings

sys.path.insert(0, str(Path(__file__).parent))
from hub_server import HubServer
from sigstore_server import SigstoreServer

if TYPE_CHECKING:
    from tests.registry.s3_server import S3Server


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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    with HubServer() as server:
        yield server


@pytest.fixture
def other(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "other")


@pytest.fixture
def version(registry: Registry, checkpoint: Artifact) -> Version:
    return registry.publish("tiny", checkpoint)


@pytest.fixture
def sigstore(monkeypatch: pytest.MonkeyPatch) -> Iterator[SigstoreServer]:
    """An instance, and no CI around us that would give its own tokens."""
    for variable in ("GITHUB_ACTIONS", "GITLAB_CI", "CIRCLECI", "BUILDKITE", "SIGSTORE_ID_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("id._internal.oidc.ambient._GCP_PRODUCT_NAME_FILE", "/nonexistent")
    with SigstoreServer() as server:
        yield server


@pytest.fixture
def trust(sigstore: SigstoreServer, tmp_path: Path) -> Path:
    return sigstore.write_trust_config(tmp_path / "trust.json")


@pytest.fixture
def alice(sigstore: SigstoreServer, trust: Path) -> KeylessSigner:
    return KeylessSigner(sigstore.token("alice@example.com"), trust)


@pytest.fixture
def is_alice(sigstore: SigstoreServer, trust: Path) -> IdentityVerifier:
    return IdentityVerifier("alice@example.com", sigstore.issuer, trust)


@pytest.fixture(scope="session")
def session_s3_server() -> Iterator["S3Server"]:
    from tests.registry.s3_server import S3Server

    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3_server(session_s3_server: "S3Server", monkeypatch: pytest.MonkeyPatch) -> Iterator["S3Server"]:
    """An S3 server that answers, and the environment that leads to it."""
    from s3fs import S3FileSystem

    for name, value in session_s3_server.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    session_s3_server.requests.clear()
    yield session_s3_server
    session_s3_server.until_down = None
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(s3_server: "S3Server") -> str:
    """The URL of a store in a new bucket, not claimed yet."""
    from s3fs import S3FileSystem

    name = f"bucket-{uuid4().hex}"
    S3FileSystem().mkdir(name)
    return f"s3://{name}/models"


@pytest.fixture(params=["s3", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a store, not claimed yet."""
    made = {"file": f"file://{tmp_path}/mounted/models", "memory": f"memory://{uuid4().hex}"}
    return made.get(request.param) or request.getfixturevalue("bucket")
