"""What the server keeps for us: slots, automations, pools; and the answers where it is not as it should be."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.flows.webhook_server import WebhookServer


def test_one_run_of_a_model_at_a_time(server: str) -> None:
    from flows.slots import alone_with

    order = []

    def second() -> None:
        with alone_with("alice/base", "cpu"):
            order.append("second")

    waiting = threading.Thread(target=second)
    with alone_with("alice/base", "cpu"):
        waiting.start()
        with alone_with("bob/base", "cpu"):  # another model's
            order.append("other")
        time.sleep(1)
        order.append("first ends")
    waiting.join(120)
    assert order == ["other", "first ends", "second"]


def test_a_folder_has_one_slot_by_all_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.slots import _slug

    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to("base")
    names = ["base", "base/", "./base", str(tmp_path / "base"), f"{tmp_path}/base/../base/", "link"]
    assert len({_slug(name) for name in names}) == 1
    demo = _slug("demo")
    (tmp_path / "demo").mkdir()
    assert _slug("demo") == demo  # means the bundled model, whatever lies here
    assert len({demo, _slug("base"), _slug("alice/base"), _slug("bob/base")}) == 4


def test_the_slot_of_a_gpu_is_a_limit_of_one_that_must_exist(server: str) -> None:
    from prefect.client.orchestration import get_client

    from flows.slots import holding

    with holding(["bitsmith-gpu-test"]), get_client(sync_client=True) as client:
        limit = client.read_global_concurrency_limit_by_name("bitsmith-gpu-test")
        assert (limit.limit, limit.active_slots) == (1, 1)
    with get_client(sync_client=True) as client:
        assert client.read_global_concurrency_limit_by_name("bitsmith-gpu-test").active_slots == 0


def test_a_gpu_that_is_not_there_is_told() -> None:
    import torch

    from flows.slots import gpu_ids
    from pipeline.errors import RecipeError

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RecipeError, match="Device 'cuda:7' cannot be used"):
        gpu_ids("cuda:7")


@pytest.mark.parametrize("strategy", ["CANCEL_NEW", "ENQUEUE"])
def test_runs_that_were_missed_become_the_last_of_them(
    server: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one schedule, that is: with other parameters, or by hand, they are others."""
    from prefect.client.orchestration import get_client
    from prefect.states import Scheduled

    from flows import late
    from flows.configuration import Deployment
    from flows.deploy import runner_deployment

    entry = {"name": f"late-{strategy}", "entrypoint": "flows.collect_garbage.collect_garbage"}
    limit = {"limit": 1, "collision_strategy": strategy}
    made = runner_deployment(Deployment.model_validate(entry | {"concurrency_limit": limit}))
    made.job_variables, now = {}, datetime.now(UTC)  # as `serve` has it
    with get_client(sync_client=True) as client:
        assert late.collapse_late_runs(client, [made]) == 0  # the server knows nothing of it yet
        known, runs = made.apply(), {}
        missed = {"1": 1, "2": 2, "3": 3, "tomorrow": -1, "weekly": 2, "by hand": 3}
        for name, days in missed.items():
            grace = {"grace": "1d"} if name == "weekly" else {"grace": "7d"}
            state = Scheduled(scheduled_time=now - timedelta(days=days))
            runs[name] = client.create_flow_run_from_deployment(known, state=state, parameters=grace).id
        listed = client.read_flow_runs

        def by_schedule(**filters: Any) -> list[Any]:
            found = listed(**filters)
            return [run.model_copy(update={"auto_scheduled": run.id != runs["by hand"]}) for run in found]

        monkeypatch.setattr(client, "read_flow_runs", by_schedule)
        monkeypatch.setattr(late, "AT_ONCE", 2)
        expected = {"2", "3"} if strategy == "CANCEL_NEW" else set()
        assert late.collapse_late_runs(client, [made]) == len(expected)
        ended = {name: client.read_flow_run(run).state for name, run in runs.items()}
        client.delete_deployment(known)
    assert {name for name, state in ended.items() if not state.is_scheduled()} == expected
    assert {ended[name].message for name in expected} <= {late.MESSAGE}


def test_a_run_without_heartbeats_is_crashed_and_told(server: str) -> None:
    """One says that it is alive once, one not even that; nothing more is done, as if their processes were killed.

    The webhook hears of each, though it refuses at first.
    """
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.events import emit_event
    from prefect.states import Running

    from flows.automations import MESSAGE, SPEAKER, make_automations
    from flows.version import WITHIN

    @flow(name="vanishing")
    def vanishing() -> None:
        pass

    def heartbeat(run: Any) -> None:
        emit_event(
            "prefect.flow-run.heartbeat",
            resource={"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.name": run.name},
            related=[{"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"} for tag in run.tags],
        )

    with WebhookServer() as webhook, get_client(sync_client=True) as client:
        webhook.refusals = 1
        make_automations(webhook.url, silence=timedelta(seconds=10))
        assert SPEAKER in make_automations(None, silence=timedelta(seconds=10))  # it has a webhook already
        time.sleep(2)  # the automations' service hears of new ones
        foreign = client.create_flow_run(vanishing, state=Running())
        inside = client.create_flow_run(vanishing, tags=[WITHIN], state=Running())  # is crashed first
        heartbeat(foreign)
        heartbeat(inside)
        time.sleep(3)  # SQLite is not for many at once: the server looks every second
        run = client.create_flow_run(vanishing, tags=["bitsmith"], state=Running())
        heartbeat(run)
        time.sleep(3)
        mute = client.create_flow_run(vanishing, tags=["bitsmith"])
        client.set_flow_run_state(mute.id, Running())
        give_up_at = time.monotonic() + 180
        while time.monotonic() < give_up_at and len({told["run"] for told in webhook.received}) < 2:
            time.sleep(0.5)
        ended = [client.read_flow_run(each.id) for each in (run, mute)]
        within, other = (client.read_flow_run(each.id) for each in (inside, foreign))
    told = {message["run"]: message for message in webhook.received}
    assert told.keys() == {each.name for each in ended}
    for each in ended:
        assert each.state.is_crashed()
        assert each.state.message.startswith(MESSAGE)
        message = told[each.name]
        assert (message["flow"], message["state"]) == ("vanishing", "Crashed")
        assert message["message"] == each.state.message
        assert str(each.id) in message["url"]
    assert within.state.is_crashed()
    assert other.state.is_running()  # one that is not ours


@pytest.mark.slow
def test_a_run_that_a_worker_or_serve_took_and_that_did_not_begin_is_crashed(server: str) -> None:
    """As if they were killed before the run's process could speak."""
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.states import Pending, Running

    from flows.automations import MESSAGE, make_automations
    from flows.configuration import Deployment
    from flows.deploy import deploy
    from flows.version import SERVED

    @flow(name="served")
    def in_serve() -> None:
        pass

    entry = {"name": "stillborn", "entrypoint": "flows.collect_garbage.collect_garbage"}
    entry["concurrency_limit"] = {"limit": 2}
    deploy([Deployment.model_validate(entry)])
    make_automations(None, to_begin=timedelta(seconds=10))
    time.sleep(2)  # the automations' service hears of new ones
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("collect-garbage/stillborn")
        taken, begun = (client.create_flow_run_from_deployment(deployment.id) for _ in range(2))
        served = client.create_flow_run(in_serve, tags=["bitsmith", SERVED])
        by_hand = client.create_flow_run(in_serve, tags=["bitsmith"])
        for state, runs in ((Pending(), (taken, begun, served, by_hand)), (Running(), (begun,))):
            for run in runs:
                client.set_flow_run_state(run.id, state)
        give_up_at = time.monotonic() + 180
        while time.monotonic() < give_up_at:
            ended = [client.read_flow_run(each.id) for each in (taken, served)]
            if all(each.state.is_final() for each in ended):
                break
            time.sleep(0.5)
        others = [client.read_flow_run(each.id).state.name for each in (begun, by_hand)]
    for each in ended:
        assert each.state.is_crashed()
        assert each.state.message.startswith(MESSAGE)
    assert others == ["Running", "Pending"]


def test_unknown_pool_is_told_with_the_known_ones(server: str) -> None:
    from flows.configuration import Deployment
    from flows.deploy import deploy
    from flows.errors import DeployError

    entry = {"name": "gc", "entrypoint": "flows.collect_garbage.collect_garbage", "work_pool": {"name": "tpu"}}
    with pytest.raises(DeployError, match=r"no work pool 'tpu'\. There are bitsmith-cpu, bitsmith-gpu"):
        deploy([Deployment.model_validate(entry)])


def test_a_registry_whose_database_does_not_answer_is_told(server: str, tmp_path: Path) -> None:
    from flows.configuration import Deployment
    from flows.deploy import deploy
    from flows.errors import DeployError
    from flows.serve import serve
    from registry.settings import RegistrySettings

    RegistrySettings("postgresql://nobody@127.0.0.1:9/none", None).write(tmp_path)
    entry: dict[str, Any] = {"name": "gc", "entrypoint": "flows.collect_garbage.collect_garbage"}
    entry["parameters"] = {"registry": str(tmp_path)}
    told = r"Deployment gc, registry .*127\.0\.0\.1:9/none cannot be used"
    with pytest.raises(DeployError, match=told):
        deploy([Deployment.model_validate(entry)])
    with pytest.raises(DeployError, match=told):
        serve([Deployment.model_validate(entry)], port=9, limit=1)


@contextmanager
def answering(status_of: Callable[[str], int]) -> Iterator[str]:
    """The URL of a server that answers each path with a status, and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status_of(self.path))
            self.send_header("Content-Length", "0")
            self.send_header("Retry-After", "0")
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_address[1]}/api"
    listening.shutdown()
    listening.server_close()


@pytest.fixture
def without_database() -> Iterator[str]:
    """As a server answers that has lost its database."""
    with answering(lambda path: 503) as url:
        yield url


@pytest.fixture
def locked() -> Iterator[str]:
    """As a server answers that wants credentials: `/ready` is for all."""
    with answering(lambda path: 200 if path.endswith("/ready") else 401) as url:
        yield url


def test_a_server_that_does_not_answer_and_none_at_all_are_told(without_database: str, locked: str) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.errors import DeployError
    from flows.named_server import check_server

    cases: dict[Any, str] = {
        None: "PREFECT_API_URL names none",
        "http://127.0.0.1:9/api": "No Prefect server answers at http://127.0.0.1:9/api",
        locked: r"refuses the credentials of this machine \(HTTP 401\)\. Set PREFECT_API_AUTH_STRING",
        without_database: r"not ready \(HTTP 503\): most likely it cannot reach its database",
    }
    for url, expected in cases.items():
        settings = {"updates": {PREFECT_API_URL: url}} if url else {"restore_defaults": [PREFECT_API_URL]}
        with temporary_settings(**settings), pytest.raises(DeployError, match=expected):
            check_server()


@pytest.mark.parametrize("command", ["run", "compress"])
def test_a_command_that_needs_no_server_wants_an_answer_from_one_that_is_named(command: str, tmp_path: Path) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.command import _compress_in_flow
    from flows.configuration import Deployment
    from flows.errors import DeployError
    from flows.run_here import run_here
    from registry import Registry

    commands: dict[str, Callable[[], Any]] = {
        "run": lambda: run_here(Deployment(name="tidy", entrypoint="flows.collect_garbage.collect_garbage")),
        "compress": lambda: _compress_in_flow([], Registry(tmp_path), tmp_path, quiet=False),
    }
    told = r"No Prefect server answers at http://127\.0\.0\.1:9/api"
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), pytest.raises(DeployError, match=told):
        commands[command]()


def test_no_server_is_looked_for_where_none_is_named() -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.named_server import check_server_if_named

    with temporary_settings(restore_defaults=[PREFECT_API_URL]):
        check_server_if_named()


def test_a_worker_of_another_version_refuses(server: str) -> None:
    from prefect import flow, tags

    from flows.errors import OtherVersionError
    from flows.version import check_version, version_tag

    @flow(name="checking")
    def checking() -> str:
        check_version()
        return "ran"

    with tags("bitsmith", version_tag()):
        assert checking() == "ran"
    assert checking() == "ran"  # no deployment's
    with tags("bitsmith", version_tag("9.9")), pytest.raises(OtherVersionError, match=r"Install bitsmith==9\.9 where"):
        checking()


def test_runs_inside_of_another_one_are_told_apart(server: str) -> None:
    from prefect import flow, tags

    from flows.version import TAG, WITHIN, tags_within

    @flow(name="outer")
    def outer() -> list[str]:
        return sorted(tags_within())

    with tags(TAG, "nightly"):
        assert outer() == [WITHIN, "nightly"]
    assert outer() == []


def test_deployed_again_a_deployment_has_what_the_file_says_now(server: str) -> None:
    from prefect.client.orchestration import get_client

    from flows.configuration import Deployment
    from flows.deploy import deploy

    entry = {"name": "again", "entrypoint": "flows.collect_garbage.collect_garbage", "paused": True}
    before = entry | {"schedule": {"cron": "0 2 * * *"}, "parameters": {"grace": "1d"}}
    after = entry | {"schedule": {"cron": "0 3 * * *", "timezone": "Asia/Tokyo"}, "concurrency_limit": 2}
    for each in (before, after, after):
        deploy([Deployment.model_validate(each)])
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name("collect-garbage/again")
    (schedule,) = [each.schedule for each in found.schedules]
    assert (schedule.cron, schedule.timezone) == ("0 3 * * *", "Asia/Tokyo")
    assert found.parameters == {}
    assert found.global_concurrency_limit.limit == 2
    assert found.concurrency_options.collision_strategy == "ENQUEUE"
    assert found.path is None


def test_what_the_server_refuses_is_told_with_what_was_changed(server: str) -> None:
    """Of a new deployment, and of one that was there."""
    from flows.configuration import Deployment
    from flows.deploy import deploy
    from flows.errors import DeployError

    entry = {"entrypoint": "flows.collect_garbage.collect_garbage"}
    wrong = {"work_pool": {"job_variables": {"working_dir": 3}}}
    first, last = (Deployment.model_validate(entry | {"name": name}) for name in ("first", "last"))
    refused = Deployment.model_validate(entry | wrong | {"name": "refused"})
    told = r"Deployment refused: the server refuses it \(.*3 is not.*before it: first; as they were: refused, last\.$"
    with pytest.raises(DeployError, match=told):
        deploy([first, refused, last])
    deploy([Deployment.model_validate(entry | {"name": "refused"})])
    with pytest.raises(DeployError, match=r"refuses it \(.*3 is not.*before it: none; as they were: refused\.$"):
        deploy([refused])
