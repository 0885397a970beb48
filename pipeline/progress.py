"""How long work tells that it is going on.

Library code calls `progress.track(items, "what")` and knows nothing of terminals; the command line
passes a rich display, a flow passes Prefect's, and everyone else gets silence.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

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


SILENT = Silent()
