"""A trial of the drill of the flows: one deployment of its own, and what became of its run."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.flows_service import POOL
from registry import Registry
from tests.pipeline.small import SMALL

KINDS = {"worker": "threads:2", "dask-worker": "dask:2", "child": "threads:2", "server": "threads:2"}
RECIPE = {
    **{name: SMALL[name] for name in ("dataset", "eval_dataset", "seq_len", "eval_windows", "eval_seq_len")},
    **{"budget": "4.5bpw", "sensitivity": "fisher", "num_samples": 16, "ranks": [4]},
    "candidates": ["nf4-g64-s8", "nf3-g64-s8", "nf2-g64-s8"],
}


@dataclass
class Trial:
    """A deployment with a registry and an output folder of its own, and its latest run.

    Attributes:
        hit: what was at work when something was killed.
        died_at: when the run's last process was seen to be gone, if the run had not ended then.
        ended_after: seconds from then until the server said that it had.
        faults: what was not as it should be.
    """

    kind: str
    number: int
    folder: Path
    run_id: str = ""
    hit: str = ""
    died_at: float | None = None
    ended_after: float | None = None
    is_second: bool = False
    is_settled: bool = False
    faults: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the deployment."""
        return f"{self.kind}-{self.number}"

    @property
    def takes_all_along(self) -> bool:
        """Does the worker's end take the processes of its run along?"""
        return self.number % 2 == 1

    def deployment(self) -> dict[str, Any]:
        """Its entry of prefect.yaml."""
        parameters = {
            "recipe": RECIPE | {"model": str(self.folder / "base")},
            "out": str(self.folder / "out"),
            "name": "tiny",
            "registry": str(self.folder / "registry"),
            "runner": KINDS[self.kind],
        }
        where = {"entrypoint": "flows.compress.compress", "work_pool": {"name": POOL}}
        return {"name": self.name, "parameters": parameters, **where}

    def digest(self) -> str:
        """Of the checkpoint."""
        return Registry(self.folder / "registry").version("tiny").digest

    def forget(self) -> None:
        """So that the work is done again."""
        for made in ("registry", "out"):
            shutil.rmtree(self.folder / made, ignore_errors=True)
