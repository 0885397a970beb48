"""Seconds and peak memory of each stage of a run."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import MemoryShortError
from pipeline.memory import device_peak_bytes, forget_device_peaks, give_back, is_shortage
from pipeline.quiet import first_line

if TYPE_CHECKING:
    from pipeline.forecast import StageForecast

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Stage:
    """One finished stage; `reused` if its result was already in the registry.

    `peak_memory_bytes` is of the process that took most, `device_peak_bytes` of the GPU of which this one took most.
    A forecast (forecast.py) is None where there was none.
    """

    name: str
    seconds: float
    peak_memory_bytes: int
    reused: bool = False
    forecast_seconds: float | None = None
    forecast_memory_bytes: int | None = None
    device_peak_bytes: int = 0
    forecast_device_bytes: int | None = None


class StageLog:
    """Collects stages in the order in which they ran.

    Attributes:
        forecasts: what they were expected to take.
    """

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.forecasts: tuple[StageForecast, ...] = ()
        self._reused = False
        self.workers_peak_bytes, self.workers_device_peak_bytes = 0, 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block.

        Raises:
            MemoryShortError: memory ran out inside; names the stage.
        """
        forget_peak()
        forget_device_peaks()
        self._reused, self.workers_peak_bytes, self.workers_device_peak_bytes = False, 0, 0
        started = time.monotonic()
        try:
            yield
        except Exception as error:
            if not is_shortage(error) or isinstance(error, MemoryShortError):
                raise
            raise MemoryShortError(
                f"The stage {name} ran out of memory ({first_line(error)}). What was finished is kept: run the "
                "same command again where more is free. Shorter windows (--seq-len, --eval-seq-len) take less, in "
                "another output folder; so does --device cpu of a GPU's memory, which collects the statistics anew."
            ) from error
        peak_bytes = max(peak_memory_bytes(), self.workers_peak_bytes)
        done = Stage(
            name,
            time.monotonic() - started,
            peak_bytes,
            self._reused,
            device_peak_bytes=max(device_peak_bytes(), self.workers_device_peak_bytes),
        )
        for expected in self.forecasts:
            if expected.name == name and not self._reused:
                done = replace(
                    done,
                    forecast_seconds=expected.seconds,
                    forecast_memory_bytes=expected.memory_bytes,
                    forecast_device_bytes=expected.device_bytes,
                )
        self.stages.append(done)

    def reused(self) -> None:
        """Say that the current stage's result was there already."""
        self._reused = True

    def worker_took(self, peak_bytes: int, device_peak_bytes: int = 0) -> None:
        """Say how much memory a process took that works for the current stage, and of a GPU; the largest one's
        counts."""
        self.workers_peak_bytes = max(self.workers_peak_bytes, peak_bytes)
        self.workers_device_peak_bytes = max(self.workers_device_peak_bytes, device_peak_bytes)


def forget_peak() -> None:
    """Linux can start the high-water mark of a process anew; elsewhere the mark is of the whole run."""
    give_back()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Of this process, since the last `forget_peak`."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
