"""How long work tells that it is going on: whoever passes a `Progress` sees it, everyone else gets silence.

The same shape as the command line's and the flows' displays, which the registry does not know.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Something that long work reports to."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield `items` and show how many of `total` are through."""
        ...

    def say(self, message: str) -> None:
        """One line for the reader."""
        ...


class Silent:
    """Shows nothing."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        yield from items

    def say(self, message: str) -> None:
        pass


SILENT = Silent()
