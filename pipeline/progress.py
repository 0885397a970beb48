"""How long work tells that it is going on.

Library code calls `progress.track(items, "what")` and knows nothing of terminals; the command line
passes a rich display, a flow passes Prefect's, and everyone else gets silence.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

from pipeline.atomic import write_json

T = TypeVar("T")


class Progress(Protocol):
    """Something that long work reports to."""

    def track(self, items: Iterable[T], description: str, total: int | None = None, done: int = 0) -> Iterator[T]:
        """Yield `items` and show how many of `total` are through, `done` of them before this run."""
        ...

    def say(self, message: str) -> None:
        """One line for the reader: a fact worth knowing, not a log."""
        ...


class Silent:
    """Shows nothing: the default of every function that takes a `progress`."""

    def track(self, items: Iterable[T], description: str, total: int | None = None, done: int = 0) -> Iterator[T]:
        yield from items

    def say(self, message: str) -> None:
        pass


class Noting:
    """Another's; what is said is also written down, so that it can be said again where the work's result is used."""

    def __init__(self, progress: Progress, path: Path) -> None:
        self.progress, self.path = progress, path

    def track(self, items: Iterable[T], description: str, total: int | None = None, done: int = 0) -> Iterator[T]:
        return self.progress.track(items, description, total, done)

    def say(self, message: str) -> None:
        write_json(self.path, list(dict.fromkeys([*self.notes(), message])))
        self.progress.say(message)

    def notes(self) -> list[str]:
        """All of them in their order, of a killed call before this one, too."""
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else []


SILENT = Silent()
