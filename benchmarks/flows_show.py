"""The flows as a service, on the loopback interface: a schedule, a worker, Dask, the Hub, a gate; night after night.

    python -m benchmarks.flows_show [--folder /tmp/nightly] [--database postgresql] [--pictures docs/images]

A Prefect server on PostgreSQL and a worker, each a process; the tests' Hub, with the demo model as the base. The
deployments of prefect.yaml are made, `nightly` with that base, five choices (the preset `fast` has 130), little text,
and a night that lasts a minute:

1. the first night: three budgets by Dask, published as branches of a repository, promoted as the gate lets them pass;
2. nothing changed: skipped;
3. the base has a new README: no statistics, costs or matrices are made again;
4. one weight of the base has changed: everything is made again.

Exits with 1 where anything else comes out. `--pictures` takes the pages of Prefect with Chromium.
"""

import argparse
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.loopback import DATABASES, ROOT, prefect_server, settle_in, worker
from registry import Registry
from tests.registry.hub_server import LFS_FROM_BYTES, WRITE_TOKEN, HubServer, Repo, StoredFile

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun, TaskRun

BASE, REPO = "alice/SmolLM2-135M-Instruct", "alice/smollm2-135m-bitsmith"
BUDGETS = ["2.5bpw", "3bpw", "4bpw"]
NAMES = [f"smollm2-{budget}" for budget in BUDGETS]
WEIGHT = "model.layers.15.mlp.down_proj.weight"
PICTURED, SECONDS_OF_A_PAGE = "bitsmith-smollm2-3bpw", 10.0
MOST_SECONDS_TO_START, MOST_SECONDS_OF_A_RUN = 180.0, 3600.0
CHEAP = {
    "preset": "fast",
    "candidates": ["lloyd2-g32-s4", "lloyd3-g32-s4", "lloyd4-g32-s4", "lloyd5-g64-s4", "nf8-g64-s8"],
    "ranks": [0],
}
BATCH = re.compile(r"(costs|decompose), part \d+ of \d+")  # what flows/spread.py calls them


@dataclass(frozen=True)
class Night:
    """A run that has ended, with the tasks of the run inside it.

    Attributes:
        waited_seconds: from the change of the base until the run began: schedule, worker, a new process.
    """

    what: str
    run: "FlowRun"
    tasks: "list[TaskRun]"
    waited_seconds: float

    @property
    def seconds(self) -> float:
        """From its start to its end."""
        return self.run.total_run_time.total_seconds()

    def __str__(self) -> str:
        spent: dict[str, list[float]] = defaultdict(list)
        for task in self.tasks:
            spent[_kind(task.name)].append(task.total_run_time.total_seconds())
        lines = [f"  {name:22} {len(times):4} tasks {sum(times):8.1f} s" for name, times in spent.items()]
        head = f"{self.what}: {self.run.state_name} in {self.seconds:.1f} s, {self.waited_seconds:.1f} s after"
        said = [f"  {self.run.state.message}"] if self.run.state.message else []
        return "\n".join([head, *said, *lines])

    @property
    def num_batches(self) -> int:
        """Batches of matrices that a worker was given."""
        return sum(BATCH.fullmatch(task.name) is not None for task in self.tasks)


def main() -> None:
    """See the module's docstring."""
    asked = _parser().parse_args()
    folder: Path = asked.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with HubServer() as hub:
        settle_in(
            folder,
            asked.port,
            HF_ENDPOINT=hub.endpoint,
            HF_HUB_DISABLE_XET="1",
            HF_HUB_OFFLINE="0",
            HF_TOKEN=WRITE_TOKEN,
        )
        base = _demo_folder()
        hub.repos[BASE] = Repo(private=False)
        hub.repos[BASE].commit(_files(base) | {"README.md": _readme("A model.")}, "first")
        with prefect_server(folder, asked.database) as url:
            _deploy(folder, asked)
            with worker(folder, "bitsmith-cpu") as log:
                nights = _Show(hub, Registry(folder / "bitsmith" / "registry"), log).nights(base)
                pages = url.removesuffix("/api")
                if asked.pictures:
                    _take_pictures(pages, nights, asked.pictures)
                if asked.hold:
                    input(f"Look at {pages}; Enter ends it. ")
    first, second, third, fourth = (f"{night.seconds:.1f} s" for night in nights)
    print(
        f"{len(BUDGETS)} budgets of the demo model by {asked.runner} on {asked.database}: {first}; "
        f"unchanged: {second}; README changed: {third}; a weight changed: {fourth}"
    )


class _Show:
    def __init__(self, hub: HubServer, registry: Registry, log: Path) -> None:
        self.hub, self.registry, self.log = hub, registry, log

    def nights(self, base: Path) -> list[Night]:
        """All four, each looked at."""
        first = self.night("first night", "Completed")
        self.expect(first.num_batches > 0, "no batch was handed out")
        self.expect_promoted(1)
        second = self.night("nothing changed", "Skipped")
        self.expect(second.tasks == [], "an unchanged base was compressed")
        self.expect_promoted(1)
        self.commit({"README.md": _readme("A model, better described.")}, "Describe it better")
        third = self.night("README changed", "Completed")
        self.expect(third.num_batches == 0, "matrices were made again for a README")
        self.expect_promoted(2)
        self.commit({"model.safetensors": _other_weight(base)}, "Mend a weight")
        fourth = self.night("a weight changed", "Completed")
        self.expect(fourth.num_batches >= first.num_batches, "a changed weight was overlooked")
        self.expect_promoted(3)
        return [first, second, third, fourth]

    def commit(self, files: dict[str, StoredFile], summary: str) -> None:
        """On top of the base's latest files."""
        self.hub.repos[BASE].commit(self.hub.head(BASE) | files, summary)

    def night(self, what: str, state: str) -> Night:
        """Switch the schedule on until it has started a run; the run, once it has ended."""
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name("watch/nightly")
            began = time.time()
            known = {run.id for run in _runs_of(client, deployment.id)}
            client.resume_deployment(deployment.id)
            run = self._wait(
                lambda: next((run for run in _runs_of(client, deployment.id) if run.id not in known), None),
                MOST_SECONDS_TO_START,
            )
            client.pause_deployment(deployment.id)
            self._wait(lambda: client.read_flow_run(run.id).state.is_final(), MOST_SECONDS_OF_A_RUN)
            run = client.read_flow_run(run.id)
            night = Night(what, run, _tasks_inside(client, run), run.start_time.timestamp() - began)
        print(night, flush=True)
        self.expect(run.auto_scheduled, "it was not the schedule that started the run")
        self.expect(run.state_name == state, f"expected {state}")
        return night

    def expect_promoted(self, number: int) -> None:
        """Each budget's version `number` is in use, and on the Hub."""
        found = {name: self.registry.aliases(name).get("production") for name in NAMES}
        self.expect(set(found.values()) == {number}, f"production names {found}")
        tags = self.hub.repos[REPO].tags
        self.expect(len(tags) == number * len(NAMES), f"the Hub has {sorted(tags)}")

    def expect(self, holds: bool, otherwise: str) -> None:
        """Or end, with the worker's log."""
        if not holds:
            print(self.log.read_text(encoding="utf-8", errors="replace")[-8000:], file=sys.stderr)
            raise SystemExit(f"Wrong: {otherwise}")

    def _wait(self, ask: Any, most_seconds: float) -> Any:
        give_up_at = time.monotonic() + most_seconds
        while time.monotonic() < give_up_at:
            if found := ask():
                return found
            time.sleep(0.5)
        return self.expect(False, f"nothing happened in {most_seconds:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/nightly"), help="is emptied first")
    parser.add_argument("--port", type=int, default=4200, help="of the Prefect server")
    parser.add_argument("--database", choices=DATABASES, default=DATABASES[0])
    parser.add_argument("--runner", default="dask:2", help="see flows/runner.py")
    parser.add_argument("--samples", type=int, default=4, help="calibration windows")
    parser.add_argument("--windows", type=int, default=4, help="evaluation windows")
    parser.add_argument("--gate", default="kld<=3")
    parser.add_argument("--pictures", type=Path, help="folder for pictures of Prefect's pages; needs Chromium")
    parser.add_argument("--hold", action="store_true", help="leave all up at the end, to look at Prefect's pages")
    return parser


def _deploy(folder: Path, asked: argparse.Namespace) -> None:
    """The example file, with the base that is here and a night a minute."""
    from flows.configuration import read_configuration
    from flows.deploy import deploy

    content = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    nightly = content["deployments"][0]
    cheap = CHEAP | {"num_samples": asked.samples, "eval_windows": asked.windows}
    nightly["parameters"] |= {
        "recipe": {"model": BASE} | cheap,
        "budgets": BUDGETS,
        "out": str(folder / "smollm2"),
        "gates": [asked.gate],
        "repo": REPO,
        "layout": "branches",
        "alias": "production",
        "runner": asked.runner,
    }
    nightly |= {"schedule": {"cron": "* * * * *", "timezone": "Europe/Berlin"}, "paused": True}
    file = folder / "prefect.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    deploy(read_configuration(file))


def _demo_folder() -> Path:
    from pipeline.model import open_model

    return open_model("demo").path


def _files(folder: Path) -> dict[str, StoredFile]:
    return {path.name: _stored(path.read_bytes()) for path in folder.iterdir() if path.name != "source.json"}


def _stored(content: bytes) -> StoredFile:
    return StoredFile(content, len(content) >= LFS_FROM_BYTES)


def _readme(text: str) -> StoredFile:
    return _stored(f"---\nlicense: apache-2.0\n---\n\n{text}\n".encode())


def _other_weight(folder: Path) -> StoredFile:
    from safetensors.torch import load_file, save

    tensors = load_file(folder / "model.safetensors")
    tensors[WEIGHT][0, 0] += 0.5
    return _stored(save(tensors, metadata={"format": "pt"}))


def _runs_of(client: Any, deployment_id: Any) -> "Sequence[FlowRun]":
    """Those that have begun."""
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

    runs = client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment_id])))
    return [run for run in runs if run.start_time is not None]


def _tasks_inside(client: Any, run: "FlowRun") -> "list[TaskRun]":
    """Of the runs that `run` started, in the order of their start."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId

    inside = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run.id]))
    found: list[TaskRun] = []
    while page := client.read_task_runs(flow_run_filter=inside, offset=len(found)):
        found += page
    return sorted((task for task in found if task.start_time), key=lambda task: task.start_time)


def _kind(name: str) -> str:
    """What `costs, part 3 of 27`, `decompose at 3bpw` and `prepare-1f2` have in common with others."""
    return re.sub(r"part \d+ of \d+", "a part", re.sub(r" at .*|-[0-9a-f]{3}$", "", name))


def _take_pictures(pages: str, nights: list[Night], folder: Path) -> None:
    """Of Prefect's pages, in their first interface, which is what a server shows that nobody has set up."""
    from prefect.artifacts import Artifact
    from prefect.client.orchestration import get_client

    from benchmarks.browser import browser

    with get_client(sync_client=True) as client:
        client.resume_deployment(client.read_deployment_by_name("watch/nightly").id)
    inside, made = nights[0].tasks[0].flow_run_id, Artifact.get(PICTURED)
    folder.mkdir(parents=True, exist_ok=True)
    with browser(1400, 460) as page:
        page.open(f"{pages}/deployments", SECONDS_OF_A_PAGE)
        page.save(folder / "prefect_deployments.png")
        page.resize(1300, 1100)
        page.open(f"{pages}/runs", SECONDS_OF_A_PAGE)
        page.click("Hide subflows", SECONDS_OF_A_PAGE)
        page.save(folder / "prefect_runs.png")
        page.open(f"{pages}/runs/flow-run/{inside}", SECONDS_OF_A_PAGE)
        page.click("Task Runs", SECONDS_OF_A_PAGE)
        page.save(folder / "prefect_run.png")
        page.open(f"{pages}/artifacts/artifact/{made.id}", SECONDS_OF_A_PAGE)
        page.save(folder / "prefect_version.png")


if __name__ == "__main__":
    main()
