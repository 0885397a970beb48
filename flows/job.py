"""What crosses the border between tasks: plain JSON, from which any process opens the same run again.

A `Job` names the run, a `Done` one finished stage of it, an `Outcome` the whole. Tensors stay in the
registry, named by digests.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from flows.progress import RunProgress
from flows.runner import Runner
from pipeline.disk_space import check_disk, disk_may_fill
from pipeline.errors import RecipeChangedError
from pipeline.home import expanded, home, output_path
from pipeline.output import OutputFolder
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.stages import Stage, StageLog
from registry import Artifact, Registry

if TYPE_CHECKING:
    from pipeline.compress import Compressed
    from pipeline.forecast import StageForecast
    from pipeline.run import Run

SHARED = ("statistics", "costs", "decompose")  # stages whose work a cluster takes
_opened: dict[str, "Run"] = {}  # the latest of this process: opening reads and hashes the whole model


class Done(TypedDict):
    """A finished stage (pipeline.stages.Stage); without a digest where the recipe asks for no such thing."""

    name: str
    seconds: float
    peak_memory_bytes: int
    reused: bool
    forecast_seconds: float | None
    forecast_memory_bytes: int | None
    device_peak_bytes: int
    forecast_device_bytes: int | None
    digest: str | None


class Job(TypedDict):
    """A prepared run. `facts` pins what the recipe's words stood for when it was prepared.

    `forecasts` are of pipeline.forecast.StageForecast, for the stages that were to come then. `embeddings_are_free`
    where the program chooses how they are packed.
    """

    recipe: dict[str, Any]
    facts: dict[str, Any]
    registry: str
    out: str
    name: str
    device: str
    runner: str
    resume: bool
    was_finished: bool
    embeddings_are_free: bool
    forecasts: list[dict[str, Any]]
    opened: Done


class Outcome(TypedDict):
    """A finished run: its version ("name:1") and its stages in order."""

    job: Job
    version: str
    stages: list[Done]


def registry_folder(registry: str | None) -> Path:
    """What a flow's parameter means: that folder, or the user's own."""
    return _placed(expanded(registry)) if registry else home() / "registry"


def out_folder(out: str) -> Path:
    """What a flow's parameter means."""
    return _placed(output_path(out))


def _placed(path: Path) -> Path:
    """A relative one is below $BITSMITH_HOME: a worker gives each run a folder to work in, and removes it after it."""
    return home().absolute() / path


def prepare_job(
    recipe: dict[str, Any], registry: str, out: str, name: str, device: str, runner: str, resume: bool
) -> Job:
    """Check everything that can be checked before long work, and take possession of the output folder.

    Raises:
        PipelineError: see pipeline/errors.py.
    """
    from pipeline.run import Run

    store = Registry(Path(registry))
    store.checked_name(name)
    where = Runner.parse(runner)
    where.task_runner()
    log = StageLog()
    with log.stage("open"):
        run = Run.prepare(
            Recipe.from_json(recipe),
            store,
            device=device,
            resume=resume,
            log=log,
            progress=RunProgress(),
        )
        output = OutputFolder(out_folder(out), run.facts)
        if not output.is_finished():
            check_disk([run], output.path)
            log.forecasts = checked_forecast(run, where)
            run.model.check_finite(run.progress)
        with disk_may_fill(run, output.path.parent):
            output.claim(resume=resume)
        was_finished = output.is_finished() and output.is_reported()
    job = _job(run, output, registry, name, runner, was_finished, done_of(log, None))
    _remember(job, run)
    return job


def prepare_jobs(
    recipes: list[dict[str, Any]], registry: str, out: str, name: str, device: str, runner: str, resume: bool
) -> list[Job]:
    """`prepare_job` for recipes that differ in the budget alone, into folders below `out`.

    Raises:
        PipelineError: see pipeline/errors.py; for whichever budget, nothing is written then.
    """
    from pipeline.sweep import largest_run, prepare_parts

    where = Runner.parse(runner)
    where.task_runner()

    def forecast(runs: "list[Run]") -> None:
        forecasts = checked_forecast(largest_run(runs), where)
        for run in runs:
            run.log.forecasts = forecasts

    parts = prepare_parts(
        [Recipe.from_json(recipe) for recipe in recipes],
        Registry(Path(registry)),
        out_folder(out),
        name=name,
        device=device,
        resume=resume,
        before_claim=forecast,
        progress=RunProgress(),
    )
    opened = done_of(parts[0].run.log, None)
    found = opened | {"seconds": 0.0, "peak_memory_bytes": 0, "reused": True}
    jobs = [
        _job(part.run, part.output, registry, part.name, runner, part.is_finished, found if number else opened)
        for number, part in enumerate(parts)
    ]
    _remember(jobs[0], parts[0].run)
    return jobs


def checked_forecast(run: "Run", runner: Runner) -> "tuple[StageForecast, ...]":
    """What the stages to come will take.

    Raises:
        MemoryShortError: one of them does not fit; those that a cluster's machines share are not this one's to judge.
    """
    from pipeline.forecast import forecast
    from pipeline.memory_check import check_memory

    stages = forecast(run)
    check_memory(run, tuple(stage for stage in stages if runner.address is None or stage.name not in SHARED))
    return stages


def open_run(job: Job, progress: Progress) -> "Run":
    """The run of `job`, opened once a process.

    Raises:
        RecipeChangedError: the model or a text is no longer what it was when the job was prepared.
    """
    run = _opened.get(_key(job))
    if run is None:
        from pipeline.run import Run

        recipe, registry = Recipe.from_json(job["recipe"]), Registry(Path(job["registry"]))
        run = Run.open(recipe, registry, device=job["device"], resume=job["resume"], log=StageLog(), progress=progress)
        changed = [field for field in sorted(run.facts) if run.facts[field] != job["facts"].get(field)]
        if changed:
            raise RecipeChangedError(
                f"The run into {job['out']} was prepared with another model or text: {', '.join(changed)} "
                "changed since, or differ on this machine. Start the run again, and leave the files alone "
                "while it lasts."
            )
        _remember(job, run)
    return run


def artifact(run: "Run", done: Done) -> Artifact:
    """What a stage made. Raises NotFoundError if it is not in the registry."""
    return run.registry.get(str(done["digest"]))


def artifact_if_any(run: "Run", done: Done) -> Artifact | None:
    """The same; None if the recipe asks for none."""
    return artifact(run, done) if done["digest"] else None


def done_of(log: StageLog, made: Artifact | None) -> Done:
    """The latest stage of `log`, and what it made."""
    stage = asdict(log.stages[-1])
    return Done(**stage, digest=made.digest if made else None)  # type: ignore[typeddict-item]


def output_folder(run: "Run", job: Job) -> OutputFolder:
    """Where the checkpoint goes."""
    return OutputFolder(Path(job["out"]), run.facts)


def read_outcome(outcome: Outcome) -> "Compressed":
    """The run's result as the command line's own `compress` returns it."""
    from pipeline.compress import Compressed

    run = open_run(outcome["job"], RunProgress())
    made = {done["name"]: done for done in outcome["stages"]}
    return Compressed(
        folder=Path(outcome["job"]["out"]),
        version=run.registry.version(outcome["version"]),
        plan=run.results.plan(artifact(run, made["plan"])),
        evaluation=run.results.eval_report(artifact_if_any(run, made["evaluate"])),
        recovery=run.results.recovery(artifact(run, made.get("recover", made["decompose"]))),
        stages=tuple(_stage(done) for done in outcome["stages"]),
        size_bytes=artifact(run, made["checkpoint"]).size_bytes,
        original_bytes=run.model.folder_bytes,
        was_finished=outcome["job"]["was_finished"],
    )


def _job(
    run: "Run", output: OutputFolder, registry: str, name: str, runner: str, was_finished: bool, opened: Done
) -> Job:
    from pipeline.allocation import free_to_choose

    return Job(
        recipe=run.recipe.to_json(),
        facts=run.facts,
        registry=registry,
        out=str(output.path),
        name=name,
        device=run.device,
        runner=runner,
        resume=run.resume,
        was_finished=was_finished,
        embeddings_are_free=bool(free_to_choose(run.embeddings)),
        forecasts=[asdict(stage) for stage in run.log.forecasts],
        opened=opened,
    )


def _key(job: Job) -> str:
    return json.dumps([job["facts"], job["registry"], job["device"], job["resume"]], sort_keys=True)


def _remember(job: Job, run: "Run") -> None:
    _opened.clear()
    _opened[_key(job)] = run


def _stage(done: Done) -> Stage:
    return Stage(**{key: value for key, value in done.items() if key != "digest"})  # type: ignore[arg-type]
