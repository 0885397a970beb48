"""Costs and decomposition by the flows' runners and by the plain command line, in one run; then a 70B model, simulated.

    python -m benchmarks.flows_speed [--layers 30] [--runners threads:1 threads:2 dask:1 dask:2] [--repeats 2]

The first layers of the demo model with a preset's choices; low-rank parts, which take several times as long, only where
`--ranks` asks for them. `cores` is the plain command line's way: all cores of this machine, without Prefect. A stage's
seconds are its wall time as a user waits for it, processes that must start included: once for both stages, as in the
flow. Of several repeats, through all ways in turn, the shortest counts, as other work on the machine only adds.

Orchestration is what keeps a worker from working, as a share of workers x wall time: what lies outside all of its tasks
(start and end of the task runs as the server has them: processes that start, gaps, waiting at the end for the others),
and inside them what an empty batch takes, measured by many of them on one worker.

The 70B model is list scheduling of its matrices, a batch each: seconds a weight, an empty batch and the pause between
two submissions as measured here. Its larger matrices take longer a weight, so that the share of orchestration is an
upper bound. Nothing is said about the network that brings the weights.
"""

import argparse
import heapq
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.allocation_70b import NUM_LAYERS, SHAPES
from benchmarks.loopback import free_port, prefect_server, settle_in

if TYPE_CHECKING:
    from pipeline.run import Run
    from pipeline.spread import Spread
    from registry import Artifact

CORES = "cores"
STAGES = ("costs", "decompose")
EMPTY_BATCHES = 60
SIMULATED_WORKERS = (8, 64)


@dataclass(frozen=True)
class Measured:
    """One stage in one way. Seconds; the last four are nothing for `cores`.

    Attributes:
        wall: of the whole stage.
        tasks: sum over the task runs.
        start: until the first task begins.
        num_tasks, num_workers: of the runner.
    """

    wall: float
    tasks: float = 0.0
    start: float = 0.0
    num_tasks: int = 0
    num_workers: int = 0

    def idle(self) -> float:
        """Worker seconds outside all tasks, after the start."""
        return self.num_workers * (self.wall - self.start) - self.tasks

    def orchestration(self, empty: float, *, with_start: bool = True) -> float:
        """The share of the workers' time, see the module's docstring; `empty` is what an empty batch takes."""
        wall = self.wall if with_start else self.wall - self.start
        return 1 - (self.tasks - self.num_tasks * empty) / (self.num_workers * wall)


@dataclass(frozen=True)
class Handing:
    """Seconds: a batch without a matrix on one worker, from one end to the next; and from submission to submission."""

    empty: float
    submit: float


def main() -> None:
    """See the module's docstring."""
    asked = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="bitsmith-speed-") as work:
        folder = Path(work)
        home = os.environ.get("BITSMITH_HOME")
        settle_in(folder, free_port(), **({"BITSMITH_HOME": home} if home else {}))
        with prefect_server(folder, "sqlite"):
            bench = Bench.prepare(folder, asked)
            found = bench.measure([CORES, *asked.runners], asked.repeats)
            handing = {kind: bench.hand_out(f"{kind}:1") for kind in dict.fromkeys(map(_kind, asked.runners))}
    _print_stages(bench, found, handing, asked)
    last = asked.runners[-1]
    _print_simulation(bench, found[last], handing[_kind(last)], last)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30, help="of the demo model")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows")
    parser.add_argument("--preset", default="default", help="whose choices are on offer")
    parser.add_argument("--ranks", type=int, nargs="+", default=[0], help="of low-rank parts on offer")
    parser.add_argument("--budget", default="3bpw")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--runners", nargs="+", default=["threads:1", "threads:2", "dask:1", "dask:2"])
    return parser


@dataclass(frozen=True)
class Bench:
    """A run whose statistics and plan are there."""

    run: "Run"
    statistics: "Artifact"
    plan: Any
    folder: Path

    @staticmethod
    def prepare(folder: Path, asked: argparse.Namespace) -> "Bench":
        """Cut the demo model, collect statistics, make a plan."""
        from pipeline.display import Bars
        from pipeline.model import open_model
        from pipeline.recipe import Recipe
        from pipeline.run import Run
        from pipeline.stages import StageLog
        from registry import Registry

        cut = _first_layers(open_model("demo").path, asked.layers, folder / "model")
        recipe = Recipe.of(
            asked.preset,
            model=str(cut),
            budget=asked.budget,
            num_samples=asked.samples,
            eval_windows=0,
            ranks=tuple(asked.ranks),
        )
        registry = Registry(folder / "registry")
        run = Run.prepare(recipe, registry, device="cpu", resume=True, log=StageLog(), progress=Bars())
        learnt = run.statistics()
        assert learnt is not None
        plan = run.results.plan(run.plan(run.costs(learnt), learnt))
        return Bench(run, learnt, plan, folder)

    @property
    def num_params(self) -> int:
        """Weights of all matrices."""
        return sum(matrix.num_params for matrix in self.run.model.matrices)

    def measure(self, ways: list[str], num_repeats: int) -> dict[str, dict[str, Measured]]:
        """way -> stage -> of the repeat of the least wall time."""
        found: dict[str, dict[str, Measured]] = {}
        for number in range(num_repeats):
            for way in ways:
                now = self._stages(way, self.folder / f"{way.replace(':', '-')}-{number}")
                print(", ".join(f"{way} {stage}: {each.wall:.1f} s" for stage, each in now.items()), flush=True)
                found[way] = min(now, found.get(way, now), key=lambda each: both(each).wall)
        return found

    def hand_out(self, runner: str) -> Handing:
        """Empty batches, one after the other on the runner's one worker."""
        from benchmarks.in_flow import in_flow
        from flows.child import close_idle
        from flows.runner import Runner
        from flows.spread import make
        from pipeline.batch import batches_of

        run = self.run
        (batch,) = batches_of(
            self._matrix_task(self.folder), run.model.matrices[:1], run.model, self.statistics, run.registry
        )
        parsed = Runner.parse(runner)
        empty = {"batch": batch | {"names": []}, "in_child": parsed.is_here}
        submitted: list[float] = []
        finished: list[float] = []

        def work() -> None:
            with parsed.task_runner() as started:
                started.submit(make, empty).result()  # its process is up now
                futures = []
                for _ in range(EMPTY_BATCHES):
                    futures.append(started.submit(make, empty))
                    futures[-1].add_done_callback(lambda future: finished.append(time.monotonic()))
                    submitted.append(time.monotonic())
                for future in futures:
                    future.result()

        in_flow(work)
        close_idle()
        return Handing(*((times[-1] - times[0]) / (len(times) - 1) for times in (finished, submitted)))

    def _stages(self, way: str, work: Path) -> dict[str, Measured]:
        """Both, one after the other as in the flow, where the second finds the workers of the first."""
        from benchmarks.in_flow import in_flow
        from flows.cluster import end_workers, kept_workers
        from flows.runner import Runner
        from flows.spread import TaskSpread
        from pipeline.spread import over_cores
        from pipeline.stages import StageLog

        folders = {stage: work / stage for stage in STAGES}
        for folder in folders.values():
            folder.mkdir(parents=True)
        if way == CORES:
            return {stage: Measured(seconds) for stage, (_, seconds) in self._timed(folders, over_cores).items()}
        runner = Runner.parse(way)
        spread = TaskSpread(self.run.model, self.run.registry, self.statistics, runner, StageLog())

        def stages() -> dict[str, tuple[float, float]]:
            with kept_workers():
                return self._timed(folders, spread, end_workers)

        found, flow_run = in_flow(stages)
        task_runs = _task_runs(flow_run)
        return {stage: _measured(stage, *times, task_runs, runner.num_workers) for stage, times in found.items()}

    def _timed(
        self, folders: dict[str, Path], spread: "Spread", at_end: Callable[[], None] = lambda: None
    ) -> dict[str, tuple[float, float]]:
        def last() -> None:
            self._do(STAGES[-1], folders[STAGES[-1]], spread)
            at_end()  # which a user waits for, too

        found = {stage: _times(partial(self._do, stage, folders[stage], spread)) for stage in STAGES[:-1]}
        return found | {STAGES[-1]: _times(last)}

    def _do(self, stage: str, work: Path, spread: "Spread") -> None:
        from pipeline.costs import measure_costs
        from pipeline.decompose import decompose

        run, learnt = self.run, self.run.results.statistics(self.statistics)
        if stage == "costs":
            rows, seed = run.recipe.cost_rows, run.recipe.seed
            measure_costs(run.model, learnt, run.offered, num_rows=rows, seed=seed, work=work, spread=spread)
        else:
            decompose(run.model, self.plan, learnt, work, spread=spread)

    def _matrix_task(self, folder: Path) -> Any:
        from pipeline.decompose import QuantizeMatrix

        labels = {name: matrix.label for name, matrix in self.plan.matrices.items()}
        return QuantizeMatrix(self.run.model, labels, None, folder)


def both(stages: dict[str, Measured]) -> Measured:
    """The stages as one."""
    all_of_them = [*stages.values()]
    return Measured(
        wall=sum(each.wall for each in all_of_them),
        tasks=sum(each.tasks for each in all_of_them),
        start=sum(each.start for each in all_of_them),
        num_tasks=sum(each.num_tasks for each in all_of_them),
        num_workers=all_of_them[0].num_workers,
    )


def _measured(stage: str, began: float, seconds: float, task_runs: list[Any], num_workers: int) -> Measured:
    tasks = [task for task in task_runs if task.name.startswith(f"{stage}, ")]
    return Measured(
        seconds,
        tasks=sum((task.end_time - task.start_time).total_seconds() for task in tasks),
        start=min(task.start_time.timestamp() for task in tasks) - began,
        num_tasks=len(tasks),
        num_workers=num_workers,
    )


def simulate(sizes: list[int], num_workers: int, rate: float, handing: Handing) -> tuple[float, float, float]:
    """List scheduling: whoever is free takes the next batch, once it is submitted.

    Args:
        sizes: weights of each batch, in the order of submission.
        rate: seconds a weight.
    Returns:
        seconds of the whole; the share of the workers' time that is work; the share that is empty batches.
    """
    free = [0.0] * num_workers
    for number, size in enumerate(sizes, start=1):
        began = max(heapq.heappop(free), number * handing.submit)
        heapq.heappush(free, began + handing.empty + size * rate)
    seconds = max(free)
    available = num_workers * seconds
    return seconds, sum(sizes) * rate / available, len(sizes) * handing.empty / available


def _first_layers(source: Path, num_layers: int, target: Path) -> Path:
    """The model without its later layers."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}))
    tensors = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if _layer(name) < num_layers}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1


def _kind(runner: str) -> str:
    return runner.partition(":")[0]


def _times(work: Callable[[], None]) -> tuple[float, float]:
    """When it began, by the clock on the wall, and its seconds."""
    began, started = time.time(), time.monotonic()
    work()
    return began, time.monotonic() - started


def _task_runs(flow_run_id: Any) -> list[Any]:
    """Once the server knows the end of all; what it is told comes a little later."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    give_up_at = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while time.monotonic() < give_up_at:
            found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
            if found and all(task.state and task.state.is_completed() for task in found):
                return found
            time.sleep(1)
    raise SystemExit("The server did not get to know the end of all tasks.")


def _print_stages(
    bench: Bench, found: dict[str, dict[str, Measured]], handing: dict[str, Handing], asked: argparse.Namespace
) -> None:
    matrices = bench.run.model.matrices
    print(f"\n### The flows' runners, {date.today()}\n")
    print(
        f"Demo model, first {asked.layers} layers: {len(matrices)} matrices, {bench.num_params / 1e6:.1f} million "
        f"weights, preset {asked.preset} with ranks {asked.ranks} at {asked.budget}, {asked.samples} x "
        f"{bench.run.recipe.seq_len} calibration tokens. {platform.machine()}, {os.cpu_count()} cores; least of "
        f"{asked.repeats}.\n"
    )
    print("| way | costs, s | decompose, s | both, of `cores` | both, of one worker |")
    print("| --- | --: | --: | --: | --: |")
    total = {way: both(stages).wall for way, stages in found.items()}
    for way, stages in found.items():
        alone = total.get(f"{_kind(way)}:1")
        times = f"{total[CORES] / total[way]:.2f}x | {f'{alone / total[way]:.2f}x' if alone else '-'}"
        print(f"| {way} | {stages['costs'].wall:.1f} | {stages['decompose'].wall:.1f} | {times} |")
    print("\n| runner, stage | tasks | start, s | idle, worker s | an empty batch, ms | submission, ms "
          "| orchestration | without the start | if every matrix were a task |")  # fmt: skip
    print("| --- " + "| --: " * 8 + "|")
    for way, stages in found.items():
        if way == CORES:
            continue
        for stage, each in (stages | {"both": both(stages)}).items():
            empty = handing[_kind(way)].empty
            num_singles = len(matrices) * (len(STAGES) if stage == "both" else 1)
            single = num_singles * empty / (each.num_workers * (each.wall - each.start))
            print(f"| {way}, {stage} | {each.num_tasks} | {each.start:.1f} | {each.idle():.1f} | {1e3 * empty:.0f} "
                  f"| {1e3 * handing[_kind(way)].submit:.0f} | {each.orchestration(empty):.1%} "
                  f"| {each.orchestration(empty, with_start=False):.1%} | {single:.1%} |")  # fmt: skip


def _print_simulation(bench: Bench, stages: dict[str, Measured], handing: Handing, runner: str) -> None:
    sizes = [rows * columns for rows, columns in SHAPES.values()] * NUM_LAYERS
    print(f"\n70 billion parameters, simulated with what {runner} measured: {len(sizes)} matrices, a batch each, "
          f"{sum(sizes) / 1e9:.1f} billion weights\n")  # fmt: skip
    print("| stage | s a million weights | workers | order | minutes | working | empty batches |")
    print("| --- | --: | --: | --- | --: | --: | --: |")
    for stage, each in stages.items():
        rate = (each.tasks - each.num_tasks * handing.empty) / bench.num_params
        for num_workers in SIMULATED_WORKERS:
            for order, given in (("the model's", sizes), ("largest first", sorted(sizes, reverse=True))):
                seconds, working, empty = simulate(given, num_workers, rate, handing)
                print(f"| {stage} | {1e6 * rate:.2f} | {num_workers} | {order} | {seconds / 60:.1f} | {working:.1%} "
                      f"| {empty:.3%} |")  # fmt: skip


if __name__ == "__main__":
    main()
