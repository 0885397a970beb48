"""Drill of the flows: kill -9 of a worker, a Dask worker, the flow's child process or the server, at random moments.

    python -m benchmarks.flows_drill [--times 20] [--only worker dask-worker child server] [--seed 0]

A server, a worker and `python -m flows deploy` as docs/operating.md has them. Each trial compresses a tiny model into a
registry of its own. A run that does not complete must end as Failed or Crashed within two minutes after its last
process is gone, and the next run must complete. Every checkpoint must have the digest of the undisturbed one; in the
end no slot may be taken, and no process be left. Every second worker takes the processes of its run along, as a machine
that goes down does; the others leave them at work. The server comes back after 20 seconds. Exits with 1 if anything was
otherwise.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.flows_service import Service, kill_one
from benchmarks.flows_trial import KINDS, Trial
from tests.models import build_llama, save_model

STAGES = (
    "collect statistics",
    "measure costs",
    "allocate",
    "decompose",
    "write checkpoint",
    "evaluate",
    "write report",
)
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
MOST_SECONDS = 1200.0  # of a run
SECONDS_TO_END = 120.0  # of a run that has no process any more
SECONDS_TO_FREE = 90.0  # a lease is one of a minute, and the server looks every quarter of a minute
SECONDS_WITHOUT_SERVER = 20.0


class Drill:
    """Trials on one service. `num_missed` runs had ended before something could be killed, and were done again."""

    def __init__(self, service: Service, seed: int) -> None:
        self._service, self._draw = service, random.Random(seed)
        self.num_missed = 0

    def undisturbed(self, trial: Trial) -> tuple[str, float]:
        """Digest, and seconds from when a worker takes the run until it is completed."""
        self._start(trial)
        started = time.monotonic()
        state = self._ended(trial)
        if state["type"] != "COMPLETED":
            raise SystemExit(f"The undisturbed run of {trial.name} is {state['name']}: {state['message']}")
        return trial.digest(), time.monotonic() - started

    def kill_in(self, trial: Trial, seconds: float) -> None:
        """Start a run, kill within that time, and look on until the run has ended or has no process any more."""
        self._start(trial)
        started = time.monotonic()
        while not self._strike(trial, self._draw.uniform(0.0, seconds)):
            self.num_missed += 1
            seconds = min(seconds, time.monotonic() - started)  # the machine may have become faster
            trial.forget()
            self._start(trial)
            started = time.monotonic()
        give_up_at = time.monotonic() + MOST_SECONDS
        while not self.has_ended(trial) and time.monotonic() < give_up_at:
            if not self._service.processes_of(trial.run_id):
                trial.died_at = time.time()
                return
            time.sleep(0.5)

    def settle(self, trial: Trial, digest: str) -> None:
        """Wait for the run's end, let the next one go on where it was not completed, and note what is wrong."""
        trial.is_settled, state = True, self._ended(trial)
        said = f"{trial.name}, killed in {trial.hit}: {state['name']}"
        if state["type"] != "COMPLETED":
            said += self._judged_end(trial, state)
            finished = [name for name in self._service.tasks(trial.run_id, "COMPLETED") if name in STAGES]
            trial.is_second = True
            self._start(trial)
            state = self._ended(trial)
            num_found = self._service.page(trial.run_id).count("already done")
            said += f", the next run {state['name']} and found {num_found} stages done"
            if num_found < len(finished):
                trial.faults.append(f"it found {num_found} stages done where {len(finished)} were")
        if state["type"] != "COMPLETED":
            trial.faults.append(f"it did not complete: {state['name']}, {state['message']}")
        elif trial.digest() != digest:
            trial.faults.append(f"digest {trial.digest()[:12]} instead of {digest[:12]}")
        print("; ".join([said, *trial.faults]), flush=True)

    def left(self) -> list[str]:
        """Slots and processes that nothing needs any more, after the time that leases may last."""
        give_up_at = time.monotonic() + SECONDS_TO_FREE
        while True:
            slots = [f"{name} has {number} slots taken" for name, number in self._service.taken_slots().items()]
            found = slots + [f"left at work: {command}" for command in self._service.left_over()]
            if not found or time.monotonic() > give_up_at:
                return found
            time.sleep(1)

    def has_ended(self, trial: Trial) -> bool:
        """Does the server say so?"""
        return self._service.state(trial.run_id)["type"] in FINAL

    def _start(self, trial: Trial) -> None:
        """Trigger a run, and wait until a worker has taken it."""
        self._service.start_worker()
        trial.run_id, trial.died_at = self._service.trigger(f"compress/{trial.name}"), None
        give_up_at = time.monotonic() + MOST_SECONDS
        while self._service.state(trial.run_id)["type"] == "SCHEDULED":
            if time.monotonic() > give_up_at:
                raise SystemExit(f"No worker took the run of {trial.name}.")
            self._service.start_worker()
            time.sleep(0.2)

    def _strike(self, trial: Trial, delay: float) -> bool:
        """Kill after `delay` seconds, or as soon as there is something to kill; False if the run has ended by then."""
        moment = time.monotonic() + delay
        while time.monotonic() < moment and not self.has_ended(trial):
            time.sleep(min(0.5, max(0.0, moment - time.monotonic())))
        kill = {"worker": self._kill_worker, "server": self._kill_server}.get(trial.kind, self._kill_child)
        while not self.has_ended(trial):
            trial.hit = self._at_work(trial)
            if kill(trial):
                return True
        return False

    def _kill_worker(self, trial: Trial) -> bool:
        self._service.kill("worker")
        while trial.takes_all_along and (own := self._service.processes_of(trial.run_id)):
            for process in own:
                kill_one(process)
        return True

    def _kill_server(self, trial: Trial) -> bool:
        self._service.kill("server")
        time.sleep(SECONDS_WITHOUT_SERVER)
        self._service.start_server()
        return True

    def _kill_child(self, trial: Trial) -> bool:
        """False where there is none."""
        is_dask = trial.kind == "dask-worker"
        found = (self._service.dask_workers_of if is_dask else self._service.children_of)(trial.run_id)
        return bool(found) and kill_one(self._draw.choice(found))

    def _at_work(self, trial: Trial) -> str:
        """The stage, or the run's state where it is in none."""
        stages = [name for name in self._service.tasks(trial.run_id, "RUNNING") if name in STAGES]
        return stages[0] if stages else self._service.state(trial.run_id)["name"].lower()

    def _ended(self, trial: Trial) -> dict[str, Any]:
        """The final state, or the one after a time in which it should have been."""
        give_up_at = time.time() + MOST_SECONDS
        if trial.died_at is not None:
            give_up_at = trial.died_at + 2 * SECONDS_TO_END
        while not self.has_ended(trial) and time.time() < give_up_at:
            time.sleep(0.5)
        return self._service.state(trial.run_id)

    def _judged_end(self, trial: Trial, state: dict[str, Any]) -> str:
        if trial.died_at is not None:
            ended_at = datetime.fromisoformat(state["timestamp"]).timestamp() if state["type"] in FINAL else time.time()
            trial.ended_after = max(0.0, ended_at - trial.died_at)
            if trial.ended_after > SECONDS_TO_END:
                trial.faults.append(f"{trial.ended_after:.0f} s after its last process it was not ended")
        if state["type"] not in ("FAILED", "CRASHED"):
            trial.faults.append(f"it was {state['name']}: {state['message']}")
        return f" {trial.ended_after or 0:.0f} s after its last process"


def drill(service: Service, work: Path, kinds: Sequence[str], times: int, *, seed: int) -> str:
    """Kill `times` times each and print how it went; the figure.

    Raises:
        SystemExit: something was not as it should be; with all of it.
    """
    base = save_model(build_llama(), work / "base")
    trials = {kind: [Trial(kind, number, work / f"{kind}-{number}") for number in range(times + 1)] for kind in kinds}
    for trial in chain(*trials.values()):
        shutil.copytree(base, trial.folder / "base")
    service.start_server()
    service.deploy([trial.deployment() for trial in chain(*trials.values())])
    drilled, undisturbed, faults = Drill(service, seed), {}, []
    for kind, (first, *others) in trials.items():
        if KINDS[kind] not in undisturbed:
            undisturbed[KINDS[kind]] = drilled.undisturbed(first)
        digest, seconds = undisturbed[KINDS[kind]]
        print(f"{kind}: undisturbed with {KINDS[kind]} {seconds:.0f} s, {digest[:12]}", flush=True)
        for trial in others:
            drilled.kill_in(trial, seconds)
            if trial.died_at is None:
                drilled.settle(trial, digest)
        for trial in others:  # whose silence the server notices meanwhile
            if trial.died_at is not None and not trial.is_settled:
                drilled.settle(trial, digest)
        print(f"{kind}: hit {dict(Counter(trial.hit for trial in others))}", flush=True)
        faults += [f"{trial.name}: {fault}" for trial in others for fault in trial.faults]
        faults += [f"after {kind}: {found}" for found in drilled.left()]
    if len({digest for digest, _ in undisturbed.values()}) > 1:
        faults.append(f"the runners differ: {undisturbed}")
    done = [trial for _, *others in trials.values() for trial in others]
    longest = max((trial.ended_after or 0.0 for trial in done), default=0.0)
    if faults:
        sys.exit("\n".join([f"{len(done)} kills, {len(faults)} faults:", *faults]))
    return (
        f"{times} kills each of {', '.join(kinds)}: {len(done)} digests as undisturbed, "
        f"{sum(trial.is_second for trial in done)} by a second run, a dead run ended after {longest:.0f} s at most, "
        f"0 slots taken, 0 processes left ({drilled.num_missed} kills came too late and were done again)"
    )


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="kills of each kind")
    parser.add_argument("--only", nargs="+", default=[*KINDS], choices=KINDS, help="kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bitsmith-drill-") as folder:
        service = Service(Path(folder))
        try:
            figure = drill(service, Path(folder), asked.only, asked.times, seed=asked.seed)
        finally:
            service.stop()
    print(figure)


if __name__ == "__main__":
    main()
