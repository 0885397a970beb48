"""How long to try again what a busy server or a lost race has refused: a few times, ever more slowly, never in step."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from registry.errors import HubRaceError, HubUnavailableError
from registry.progress import SILENT, Progress

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """Waits of `first_seconds`, twice that, and so on, each up to a half longer by chance, between `num_tries` tries.

    What the server asks for (Retry-After) is waited for, unless it is more than `longest_seconds`. Where it asks for
    nothing, or does not even answer, no try begins more than `most_seconds` after the first, or after the end of one
    that was under way for longer than that: something had been sent.
    """

    num_tries: int = 6
    first_seconds: float = 1.0
    longest_seconds: float = 300.0
    most_seconds: float = 90.0
    sleep: Callable[[float], None] = time.sleep

    def run(self, attempt: Callable[[], T], progress: Progress = SILENT) -> T:
        """The result of `attempt`, which may be called again after a HubRaceError or a HubUnavailableError.

        Raises:
            HubRaceError, HubUnavailableError: the last one, when the tries are used up or the wait would be too long.
        """
        started = time.monotonic()
        for number in range(1, self.num_tries + 1):
            began = time.monotonic()
            try:
                return attempt()
            except (HubRaceError, HubUnavailableError) as error:
                if time.monotonic() - began > self.most_seconds:
                    started = time.monotonic()
                asked = getattr(error, "retry_after_seconds", None)
                wait_seconds = max(self.first_seconds * 2 ** (number - 1), asked or 0.0) * random.uniform(1.0, 1.5)
                spent_seconds = time.monotonic() - started + wait_seconds
                is_too_long = asked > self.longest_seconds if asked else spent_seconds > self.most_seconds
                if number == self.num_tries or is_too_long:
                    raise
                progress.say(f"{error} Try {number + 1} of {self.num_tries} in {wait_seconds:.0f} s.")
                self.sleep(wait_seconds)
        raise AssertionError("num_tries is at least 1")


ONCE = Patience(num_tries=1)
