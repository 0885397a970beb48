"""Is there memory for a run? Known before it; and which settings would make it fit, where there is not."""

from collections.abc import Iterator
from dataclasses import replace

import psutil
import torch

from pipeline.budget import human_bytes
from pipeline.calibration import TokenWindows
from pipeline.errors import MemoryShortError
from pipeline.forecast import StageForecast, forecast
from pipeline.memory import free_bytes
from pipeline.run import Run

SHORTEST = 128  # tokens of a window


def check_memory(run: Run, stages: tuple[StageForecast, ...] | None = None) -> tuple[StageForecast, ...]:
    """The run's forecast.

    Args:
        stages: those of the forecast that will run, where not all of them will.
    Raises:
        MemoryShortError: a stage cannot fit; says which settings would, if any.
    """
    stages = forecast(run) if stages is None else stages
    names = {stage.name for stage in stages}
    short = _first_short(run, stages)
    if short is None:
        return stages
    stage, needed, free, where = short

    def fits(other: Run) -> bool:
        return _first_short(other, tuple(each for each in forecast(other) if each.name in names)) is None

    found = next((words for words, other in _smaller(run, names) if fits(other)), None)
    advice = f"It fits with {found}." if found else "No setting makes it fit: take a machine with more."
    raise MemoryShortError(
        f"The stage `{stage}` takes about {human_bytes(needed)} of {where}, and {human_bytes(free)} are free. {advice} "
        "Nothing was started."
    )


def _first_short(run: Run, stages: tuple[StageForecast, ...]) -> tuple[str, int, int, str] | None:
    """Name of the stage, bytes that it takes, bytes there are, and of what."""
    device = torch.device(run.device)
    mine = free_bytes(torch.device("cpu")) + psutil.Process().memory_info().rss
    for stage in stages:
        if stage.total_bytes > mine:
            return stage.name, stage.total_bytes, mine, "memory"
        if stage.device_bytes and stage.device_bytes > (free := free_bytes(device)):
            return stage.name, stage.device_bytes, free, f"memory on {run.device}"
    return None


def _smaller(run: Run, stages: set[str]) -> Iterator[tuple[str, Run]]:
    """Settings with which these stages take less, as they are typed, and the run with them and those before."""
    words: list[str] = []
    texts = run.texts
    while max(_seq_len(texts.calibration), _seq_len(texts.recovery), _seq_len(texts.evaluation)) > SHORTEST:
        halved = max(SHORTEST, max(_seq_len(texts.calibration), _seq_len(texts.evaluation)) // 2)
        texts = replace(
            texts,
            calibration=_cut(texts.calibration, halved),
            recovery=_cut(texts.recovery, halved),
            evaluation=_cut(texts.evaluation, halved),
        )
        words = [f"--seq-len {halved} --eval-seq-len {halved}"]
        yield words[0], replace(run, texts=texts)
    run = replace(run, texts=texts)
    if run.recipe.recover and "recover" in stages:
        words.append("--no-recover")
        run = replace(
            run, recipe=run.recipe.model_copy(update={"recover": False}), texts=replace(run.texts, recovery=None)
        )
        yield " ".join(words), run
    if run.recipe.sensitivity not in ("none", "factored"):
        words.append("--preset fast --sensitivity factored")
        yield " ".join(words), replace(run, recipe=run.recipe.model_copy(update={"sensitivity": "factored"}))


def _seq_len(windows: TokenWindows | None) -> int:
    return 0 if windows is None else windows.tokens.shape[1]


def _cut(windows: TokenWindows | None, seq_len: int) -> TokenWindows | None:
    return None if windows is None else replace(windows, tokens=windows.tokens[:, :seq_len])
