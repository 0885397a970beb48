"""Seconds and peak memory of each stage of a run."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Stage:
    """One finished stage; `reused` if its result was already in the registry."""

    name: str
    seconds: float
    peak_memory_bytes: int
    reused: bool = False


class StageLog:
    """Collects stages in the order in which they ran."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self._reused = False

    @contextmanager
    def stage(self, name: str) -> Iterator["StageLog"]:
        """Measure the block."""
        _forget_peak()
        self._reused = False
        started = time.monotonic()
        yield self
        self.stages.append(Stage(name, time.monotonic() - started, _peak_memory_bytes(), self._reused))

    def reused(self) -> None:
        """Say that the current stage's result was there already."""
        self._reused = True


def _forget_peak() -> None:
    """Linux can start the high-water mark of a process anew; elsewhere the mark is of the whole run."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def _peak_memory_bytes() -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
