"""The service as it is used: deployments with a schedule, a worker process, a Hub, a webhook; night after night."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from registry import Registry
from tests.flows.webhook_server import WebhookServer
from tests.registry.hub_server import LFS_FROM_BYTES, WRITE_TOKEN, HubServer, Repo, StoredFile

ROOT = Path(__file__).parents[2]
BASE, REPO = "alice/base", "alice/base-4.5bpw"


@pytest.fixture(scope="module")
def hub(tiny_model_dir: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.repos[BASE] = Repo(private=False)
        server.repos[BASE].commit(_files(tiny_model_dir), "first")
        yield server


@pytest.fixture(scope="module")
def webhook() -> Iterator[WebhookServer]:
    with WebhookServer() as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nightly")


@pytest.fixture(scope="module")
def environment(server: str, hub: HubServer, webhook: WebhookServer, home: Path) -> dict[str, str]:
    """Of the command and the worker, which are processes of their own."""
    return os.environ | {
        "BITSMITH_HOME": str(home / "bitsmith"),
        "BITSMITH_WEBHOOK": webhook.url,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": WRITE_TOKEN,
        "OMP_NUM_THREADS": "1",
        "PREFECT_API_URL": server,
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


@pytest.fixture(scope="module")
def deployed(environment: dict[str, str], home: Path, recipe: dict[str, Any]) -> str:
    """What `deploy` printed."""
    parameters = {
        "recipe": recipe | {"model": BASE, "sensitivity": "none"},
        "out": str(home / "out"),
        "name": "tiny",
        "gates": ["kld<=1e9", "bits_per_param<=4.5"],
        "repo": REPO,
        "alias": "production",
    }
    watch = {"entrypoint": "flows.watch.watch", "work_pool": {"name": "bitsmith-cpu"}}
    nightly = watch | {"name": "nightly", "parameters": parameters}
    nightly["schedule"] = {"interval": 20, "timezone": "Europe/Berlin"}  # nights are short here
    strict = watch | {"name": "strict", "parameters": parameters | {"gates": ["kld<=0"]}}
    file = home / "prefect.yaml"
    file.write_text(yaml.safe_dump({"deployments": [nightly, strict]}), encoding="utf-8")
    command = [sys.executable, "-m", "flows", "deploy", "--file", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def worker(deployed: str, environment: dict[str, str], home: Path) -> Iterator[Path]:
    """Its log."""
    log = home / "worker.log"
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "bitsmith-cpu"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, cwd=home, stdout=output, stderr=subprocess.STDOUT)
    yield log
    process.terminate()
    process.wait(60)


@pytest.fixture
def trigger(worker: Path) -> Callable[[str], Any]:
    """trigger("watch/nightly") -> the run when it has ended."""
    from prefect.client.orchestration import get_client

    def start(name: str) -> Any:
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(name)
            return _ended(client.create_flow_run_from_deployment(deployment.id).id, worker)

    return start


@pytest.mark.slow
def test_night_after_night(
    deployed: str,
    worker: Path,
    trigger: Callable[[str], Any],
    hub: HubServer,
    webhook: WebhookServer,
    home: Path,
    tmp_path: Path,
) -> None:
    """One test, as each night goes on from the one before."""
    assert "watch/nightly" in deployed
    assert "Europe/Berlin" in deployed

    first = _ended(_by_schedule(worker), worker)
    assert first.auto_scheduled
    assert first.state.name == "Completed", _log(worker)
    assert first.name == "base at 4.5bpw if changed"
    registry = Registry(home / "bitsmith" / "registry")
    assert str(registry.version("tiny@production")) == "tiny:1"
    assert set(hub.repos[REPO].tags) == {"v1"}
    assert f"{hub.endpoint}/{REPO}/tree/v1/report" in _last_artifact("bitsmith-tiny-report")
    assert "report/index.html" in hub.head(REPO)

    second = trigger("watch/nightly")
    assert (second.state.type.value, second.state.name) == ("COMPLETED", "Skipped"), _log(worker)
    assert "its recipe is the same" in second.state.message
    assert webhook.received == []

    changed = _other_model(tmp_path)
    hub.repos[BASE].commit(_files(changed), "second")
    third = trigger("watch/strict")
    assert (third.state.type.value, third.state.name) == ("FAILED", "Gated"), _log(worker)
    assert "kld is " in third.state.message
    assert "wanted <=0 (not met)" in third.state.message
    assert str(registry.version("tiny")) == "tiny:2"
    assert str(registry.version("tiny@production")) == "tiny:1"
    assert set(hub.repos[REPO].tags) == {"v1"}
    (told,) = webhook.received
    assert (told["flow"], told["run"], told["state"]) == ("watch", third.name, "Gated")
    assert told["message"] == third.state.message
    assert str(third.id) in told["url"]

    fourth = trigger("watch/nightly")  # the base is the same as in the third, and its gates let the version pass
    assert fourth.state.name == "Completed", _log(worker)
    assert str(registry.version("tiny@production")) == "tiny:2"
    assert set(hub.repos[REPO].tags) == {"v1", "v2"}
    assert len(webhook.received) == 1
    assert WebhookServer.SECRET not in _log(worker)


def test_secret_of_the_webhook_stands_nowhere(deployed: str, server: str) -> None:
    """Neither in deployments, nor in work pools, nor in the block as anybody may read it."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        shown = [each.model_dump_json() for each in client.read_deployments()]
        shown += [each.model_dump_json() for each in client.read_work_pools()]
        block = client.read_block_document_by_name("bitsmith-webhook", "custom-webhook", False)
        shown.append(block.model_dump_json())
    assert WebhookServer.SECRET not in deployed
    assert WebhookServer.SECRET not in "".join(shown)
    assert block.data["secrets"] == {"address": "********"}


def test_runs_send_heartbeats_often_enough(deployed: str, server: str) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        variables = client.read_deployment_by_name("watch/nightly").job_variables
        pool = client.read_work_pool("bitsmith-gpu")
    for environment in (variables["env"], pool.base_job_template["variables"]["properties"]["env"]["default"]):
        assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
        assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert pool.type == "process"


def test_late_runs_collapse_to_one(deployed: str, server: str) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("watch/nightly")
    assert deployment.global_concurrency_limit.limit == 1
    assert deployment.concurrency_options.collision_strategy == "CANCEL_NEW"


def _by_schedule(worker: Path) -> Any:
    """The id of the first run that the worker took up by the schedule, which is then switched off."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import FlowRunSort

    give_up_at = time.monotonic() + 120
    while time.monotonic() < give_up_at:
        with get_client(sync_client=True) as client:
            found = client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_ASC)
            if started := [run for run in found if run.auto_scheduled and not run.state.is_scheduled()]:
                client.pause_deployment(started[0].deployment_id)
                return started[0].id
        time.sleep(0.5)
    raise AssertionError(f"the schedule started no run\n{_log(worker)}")


def _ended(run_id: Any, worker: Path) -> Any:
    from prefect.client.orchestration import get_client

    give_up_at = time.monotonic() + 240
    while time.monotonic() < give_up_at:
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(run_id)
        if run.state.is_final():
            return run
        time.sleep(0.5)
    raise AssertionError(f"the run did not end\n{_log(worker)}")


def _last_artifact(key: str) -> str:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import ArtifactSort

    with get_client(sync_client=True) as client:
        found = client.read_artifacts(sort=ArtifactSort.CREATED_DESC)
    return str(next(page.data for page in found if page.key == key))


def _log(worker: Path) -> str:
    return worker.read_text(encoding="utf-8", errors="replace")


def _files(folder: Path) -> dict[str, StoredFile]:
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {name: StoredFile(content, len(content) >= LFS_FROM_BYTES) for name, content in found.items()}


def _other_model(folder: Path) -> Path:
    from tests.models import build_llama, save_model

    return save_model(build_llama(seed=1), folder / "other")
