"""Progress in Prefect's words: lines in the run's log, and a progress artifact where a server shows it.

A line comes after a tenth of the work or ten seconds, but not more than one a second, with the share done and
an estimate of the time left.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_logger, get_run_logger
from prefect.settings import PREFECT_API_URL

T = TypeVar("T")
SHARE_BETWEEN_LINES = 0.1
SECONDS_BETWEEN_LINES = 10.0
LEAST_SECONDS_BETWEEN_LINES = 1.0


@dataclass(frozen=True)
class Said:
    """A line for the log, and how far the work is that it is about, if any; as a text, what is going on."""

    line: str
    work: str | None = None
    percent: float | None = None
    is_last: bool = False
    stage: str | None = None

    def __str__(self) -> str:
        return ", ".join(part for part in (self.stage, self.work or self.line) if part)


class RunProgress:
    """A pipeline.progress.Progress that tells somebody: by default whatever Prefect run is current then."""

    def __init__(self, tell: Callable[[Said], None] | None = None) -> None:
        self._tell = tell or RunDisplay()

    def track(self, items: Iterable[T], description: str, total: int | None = None, done: int = 0) -> Iterator[T]:
        """See pipeline/progress.py."""
        pace = Pace(description, total, done)
        for item in items:
            yield item
            if pace.step():
                self._tell(Said(pace.line(), description, pace.percent))
        self._tell(Said(pace.last_line(), description, pace.percent, is_last=True))

    def say(self, message: str) -> None:
        """See pipeline/progress.py."""
        self._tell(Said(message))


class RunDisplay:
    """Shows what is said under the current Prefect run: a line in its log, and a bar a work on its page.

    Work that is through before its first line has no bar.
    """

    def __init__(self) -> None:
        self._bars: dict[str, UUID] = {}

    def __call__(self, said: Said) -> None:
        """Show it."""
        in_run = TaskRunContext.get() or FlowRunContext.get()
        (get_run_logger() if in_run else get_logger("flows")).info(said.line)
        if said.work is None or said.percent is None or not in_run or not PREFECT_API_URL.value():
            return
        try:
            self._show_bar(said.work, said.percent, said.is_last)
        except Exception as error:  # whatever a network does; it must not stop the work
            get_logger("flows").debug("No progress bar: %r", error)

    def _show_bar(self, work: str, percent: float, is_last: bool) -> None:
        if work in self._bars:
            update_progress_artifact(self._bars[work], percent, description=work)
        elif not is_last:
            self._bars[work] = cast("UUID", create_progress_artifact(percent, description=work))
        if is_last:
            self._bars.pop(work, None)


@dataclass
class Pace:
    """How far some work is, and whether it is time to say so; `num_done` includes what was there before."""

    description: str
    total: int | None
    num_done: int

    def __post_init__(self) -> None:
        self.started, self.num_before = time.monotonic(), self.num_done
        self.said_at, self.said_done = self.started, self.num_done

    def step(self) -> bool:
        """One more item is through; is a line due?"""
        self.num_done += 1
        silent_seconds = time.monotonic() - self.said_at
        share = (self.num_done - self.said_done) / self.total if self.total else 0.0
        due = self.num_done != self.total and (
            silent_seconds >= SECONDS_BETWEEN_LINES
            or (share >= SHARE_BETWEEN_LINES and silent_seconds >= LEAST_SECONDS_BETWEEN_LINES)
        )
        if due:
            self.said_at, self.said_done = time.monotonic(), self.num_done
        return due

    @property
    def percent(self) -> float | None:
        """0 to 100; None if the total is unknown."""
        return 100 * self.num_done / self.total if self.total else None

    def line(self) -> str:
        """`Cost table: 40% (84 of 210), about 0:01:20 left`"""
        if self.total is None or self.percent is None:
            return f"{self.description}: {self.num_done} done in {_clock(self._seconds)}"
        left = self._seconds / (self.num_done - self.num_before) * max(0, self.total - self.num_done)
        through = f"{self.percent:.0f}% ({self.num_done} of {self.total})"
        return f"{self.description}: {through}, about {_clock(left)} left"

    def last_line(self) -> str:
        """`Cost table: 210 of 210 in 0:02:10`"""
        return f"{self.description}: {self.num_done} of {self.total or self.num_done} in {_clock(self._seconds)}"

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self.started


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
