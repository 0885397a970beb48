"""Where the tasks of a fan-out run, by a word: what the setting `runner` of a flow may be.

    threads          child processes on this machine, one a core
    threads:4        four of them
    dask             a Dask cluster on this machine, a process a core, until the last matrix is decomposed
    dask:4           of four processes
    dask:tcp://scheduler:8786      an existing Dask cluster
    ray              Ray on this machine; ray:4 on four cores
    ray:ray://head:10001           an existing Ray cluster

Any of them gives the same bytes.
"""

import os
import re
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RecipeError

# Ray's client alone: what else `ray.init` takes as an address waits for minutes where nobody is.
_ADDRESS = {"dask": re.compile(r"\w+://\S+|[\w.-]+:\d+$"), "ray": re.compile(r"ray://\S+")}
KINDS = ("threads", "dask", "ray")


@dataclass(frozen=True)
class Runner:
    """A parsed setting. `address` names an existing cluster; without one, `num_workers` are started here."""

    kind: str
    num_workers: int
    address: str | None

    @staticmethod
    def parse(text: str) -> "Runner":
        """Raises RecipeError."""
        kind, _, rest = text.partition(":")
        is_place = bool(_ADDRESS[kind].match(rest)) if kind in _ADDRESS else False
        if kind not in KINDS or text.endswith(":") or not (not rest or rest.isdigit() or is_place):
            raise RecipeError(
                f"{text!r} is no task runner. Expected one of {', '.join(KINDS)}, with a number of workers (dask:4) or "
                "the address of a cluster (dask:tcp://scheduler:8786, ray:ray://head:10001) if wanted."
            )
        if rest.isdigit() and int(rest) < 1:
            raise RecipeError(f"{text!r} asks for {rest} workers. At least 1 is needed.")
        num_workers = int(rest) if rest.isdigit() else os.cpu_count() or 1
        return Runner(kind, num_workers, rest if rest and not rest.isdigit() else None)

    @property
    def is_here(self) -> bool:
        """Do its tasks run in this very process, so that their work wants children of its own?"""
        return self.kind == "threads"

    @property
    def starts_a_cluster(self) -> bool:
        """Are there processes to be started on this machine before its first task?"""
        return not self.is_here and self.address is None

    def task_runner(self) -> Any:
        """Prefect's. Raises RecipeError if its package is not installed."""
        try:
            return getattr(self, f"_{self.kind}")()
        except ImportError as error:
            raise RecipeError(
                f"The runner {self.kind} needs {error.name}. Install it with "
                f"`pip install 'bitsmith[flows,{self.kind}]'`."
            ) from error

    def _threads(self) -> Any:
        from prefect.task_runners import ThreadPoolTaskRunner

        return ThreadPoolTaskRunner(max_workers=self.num_workers)

    def _dask(self) -> Any:
        from prefect_dask import DaskTaskRunner

        if self.address:
            return DaskTaskRunner(address=self.address)
        workers = {"n_workers": self.num_workers, "threads_per_worker": 1, "processes": True}
        port = {"dashboard_address": "127.0.0.1:0"}  # None is 8787, with a warning where another run has it
        return DaskTaskRunner(cluster_kwargs=workers | port)

    def _ray(self) -> Any:
        from prefect_ray import RayTaskRunner

        if self.address:
            return RayTaskRunner(address=self.address)
        own = {"address": "local"}  # not one that somebody has started on this machine, or has left traces of
        return RayTaskRunner(init_kwargs=own | {"num_cpus": self.num_workers, "include_dashboard": False})
