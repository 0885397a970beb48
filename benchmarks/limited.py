"""Run a command that may take so much memory and no more: in a control group, or with a limited address space."""

import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pipeline.memory import CGROUPS

# the folder below which groups are made, and the file with the limit, of cgroup v1 and v2
VERSIONS = ((CGROUPS / "memory", "memory.limit_in_bytes"), (CGROUPS, "memory.max"))


def run_limited(
    command: Sequence[str], limit_bytes: int, **settings: str
) -> tuple[subprocess.CompletedProcess[str], str]:
    """The finished process, whose standard error is the caller's, and how it was limited.

    Args:
        settings: environment variables on top.
    """
    with _limit(limit_bytes) as (enter, how):
        done = subprocess.run(
            command,
            check=False,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=enter,
            env=os.environ | settings,
        )
    return done, how


@contextmanager
def _limit(limit_bytes: int) -> Iterator[tuple[Callable[[], None], str]]:
    """What the child does before it begins."""
    for top, limit_file in VERSIONS:
        group = top / f"bitsmith-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit_file).write_text(str(limit_bytes))
        except OSError:
            continue
        try:
            yield partial(_enter, group), "control group"
        finally:
            while (group / "cgroup.procs").read_text():  # helpers that end a moment after the command
                time.sleep(0.1)
            group.rmdir()
        return
    yield partial(resource.setrlimit, resource.RLIMIT_AS, (limit_bytes, limit_bytes)), "address space"


def _enter(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))
