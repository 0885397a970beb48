"""Do one stage of a job: in a child process, or spread over the workers of the job's runner."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

from flows.child import Say, borrowed_child
from flows.job import Done, Job, artifact_if_any, done_of, open_run
from flows.progress import RunDisplay, RunProgress, Said
from flows.runner import Runner
from pipeline.progress import Progress
from pipeline.stages import StageLog
from registry import Artifact

Work = Callable[..., Artifact | None]


class Call(NamedTuple):
    """What a child is asked for. The bytes of some stages depend on `num_threads`."""

    job: Job
    stage: str
    work: Work
    inputs: tuple[Done, ...]
    num_threads: int


def do(job: Job, stage: str, work: Work, *inputs: Done, spread: Literal["windows", "matrices"] | None = None) -> Done:
    """Do it, measured.

    Args:
        work: of flows/work.py; called with the run, the job and `inputs`.
        spread: what the stage treats one by one, so that workers may share it; matrices read the statistics, the last
            of `inputs`. This process then only hands out and takes in; without workers elsewhere, windows stay in one
            child, for one pass over a model uses all cores, and so do matrices on GPUs (pipeline/spread_gpus.py).
    Raises:
        WorkerError: the child, or a worker, died.
        PipelineError, RegistryError: as of the stage.
    """
    import torch

    runner, started = Runner.parse(job["runner"]), time.monotonic()
    is_by_child = runner.is_here and (spread == "windows" or job["device"] != "cpu")
    if spread and not is_by_child:
        done = _measured(Call(job, stage, work, inputs, torch.get_num_threads()), RunProgress(), spread)
    else:
        with borrowed_child() as child:
            asked = Call(job, stage, work, inputs, torch.get_num_threads())
            done = child.call(_in_child, asked, RunDisplay(), doing=stage)
    return done | {"seconds": time.monotonic() - started}  # type: ignore[return-value]


def _in_child(call: Call, say: Say) -> Done:
    import torch

    torch.set_num_threads(call.num_threads)

    def tell(said: Said) -> None:
        say(replace(said, stage=call.stage))

    return _measured(call, RunProgress(tell), None)


def _measured(call: Call, progress: Progress, spread: str | None) -> Done:
    from flows.spread import PartsSpread, TaskSpread
    from pipeline.forecast import StageForecast

    log = StageLog()
    log.forecasts = tuple(StageForecast(**stage) for stage in call.job["forecasts"])
    run = replace(open_run(call.job, progress), log=log, progress=progress)
    if spread == "matrices":
        statistics = artifact_if_any(run, call.inputs[-1])
        tasks = TaskSpread(run.model, run.registry, statistics, Runner.parse(call.job["runner"]), log)
        run = replace(run, spread=tasks)
    elif spread == "windows" and run.recipe.sensitivity != "none":
        parts = PartsSpread(
            run.model,
            run.registry,
            run.recipe.sensitivity,
            run.recipe.seed,
            run.device,
            Runner.parse(call.job["runner"]),
            log,
        )
        run = replace(run, spread_parts=parts)
    with log.stage(call.stage):
        made = call.work(run, call.job, *call.inputs)
    return done_of(log, made)
