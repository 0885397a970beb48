"""Drills of the registry: kill -9 at random points, and many processes at once, on SQLite and on PostgreSQL.

    python -m benchmarks.registry_drill [--kills 200] [--processes 16] [--versions 50] [--databases sqlite postgresql]

A kill: a process adds and publishes, moves an alias, makes a step's result and collects garbage, in a random order, and
is killed after a random time; then the command that was cut short runs again and must complete. At the end every
version that was acknowledged must be there with its content, the numbers without a gap, and `doctor` without a finding
that it cannot mend. Exits with 1 if anything was lost.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

# what a child would else import first, and be killed at
import registry.collection
import registry.opening
import registry.step  # noqa: F401
from registry import Registry
from registry.settings import RegistrySettings
from tests import postgresql

MOST_SECONDS = 0.5  # between a start and its kill


class Worker:
    """Does operation number `turn` of a fixed sequence, whatever happened before; a line in `log` acknowledges it."""

    def __init__(self, root: Path, log: Path, work: Path) -> None:
        self.registry, self.log, self.work = Registry(root), log, work

    def do(self, turn: int) -> None:
        """Carry out one operation."""
        draw = random.Random(turn)
        kind = draw.choice(["publish", "publish", "alias", "step", "gc"])
        {"publish": self.publish, "alias": self.alias, "step": self.step, "gc": self.gc}[kind](turn)

    def publish(self, turn: int) -> None:
        """Add a folder and give it a number."""
        folder = self.work / str(turn)
        folder.mkdir(exist_ok=True)
        (folder / "own").write_bytes(random.Random(turn).randbytes(50_000))
        (folder / "shared").write_bytes(random.Random(turn % 3).randbytes(50_000))
        artifact = self.registry.add_artifact("checkpoint", folder)
        version = self.registry.publish("model", artifact)
        self.acknowledge({"version": version.number, "digest": version.digest})

    def alias(self, turn: int) -> None:
        """Move `production` to the newest version."""
        if self.registry.versions():
            move = self.registry.alias("model", "production", reason=str(turn))
            self.acknowledge({"move": move.number, "to": move.to_version})

    def step(self, turn: int) -> None:
        """Make one of a few results, or find it made."""

        def build(workdir: Path) -> None:
            (workdir / "out").mkdir(exist_ok=True)
            (workdir / "out" / "file").write_bytes(random.Random(turn % 5).randbytes(20_000))

        self.registry.step("statistics", [], {"number": turn % 5}, build)

    def gc(self, turn: int) -> None:
        """Remove what no version needs."""
        self.registry.collect_garbage(grace_seconds=0)

    def acknowledge(self, fact: dict[str, object]) -> None:
        """One line, whole or not at all."""
        with self.log.open("a") as log:
            os.write(log.fileno(), (json.dumps(fact) + "\n").encode())


def in_child(work: Callable[[], None]) -> int:
    """Fork; the child's process number."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def drill_kills(root: Path, work: Path, num_kills: int, *, seed: int = 0) -> dict[str, int]:
    """Kill `num_kills` times; counts what was acknowledged and what is left. AssertionError if anything is lost."""
    log, turns = work / "log", work / "turns"
    log.touch()
    draw = random.Random(seed)
    turn = 0

    def endless(start: int) -> None:
        worker = Worker(root, log, work)
        for number in range(start, start + 10_000):
            turns.write_text(str(number))
            worker.do(number)

    def once(number: int) -> None:
        Worker(root, log, work).do(number)

    for _ in range(num_kills):
        start = turn
        child = in_child(lambda start=start: endless(start))
        time.sleep(draw.uniform(0.01, MOST_SECONDS))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        turn = int(turns.read_text() or start) if turns.exists() else start
        again = in_child(lambda turn=turn: once(turn))
        assert os.waitpid(again, 0)[1] == 0, f"operation {turn}, cut short, does not complete"
        turn += 1
    return checked(root, log)


def checked(root: Path, log: Path) -> dict[str, int]:
    """Compare the registry with what was acknowledged."""
    registry = Registry(root)
    versions = registry.versions()
    assert [version.number for version in versions] == list(range(1, len(versions) + 1)), "a gap in the numbers"
    by_number = {version.number: version for version in versions}
    facts = [json.loads(line) for line in log.read_text().splitlines()]
    for fact in facts:
        if "version" in fact:
            assert by_number[fact["version"]].digest == fact["digest"], f"version {fact['version']} was lost"
    moves = {move.number: move for move in registry.alias_moves("model")} if versions else {}
    assert list(moves) == list(range(1, len(moves) + 1)), "a gap in the log of aliases"
    for fact in facts:
        if "move" in fact:
            assert moves[fact["move"]].to_version == fact["to"], f"move {fact['move']} was lost"
    for version in versions:
        registry.verify(str(version)).raise_if_damaged()
    left = [finding for finding in Registry.examine(root) if not finding.is_repaired]
    assert not left, f"doctor: {left}"
    assert Registry.examine(root) == [], "doctor finds something a second time"
    return {"acknowledged": len(facts), "versions": len(versions), "moves": len(moves)}


def drill_processes(root: Path, work: Path, num_processes: int, num_each: int) -> dict[str, int]:
    """Let many processes publish at once; raises AssertionError where a number is lost, doubled or left out."""

    def publish(process: int) -> None:
        registry = Registry(root)
        for number in range(num_each):
            folder = work / f"{process}-{number}"
            folder.mkdir()
            (folder / "file").write_text(f"{process} {number}")
            registry.publish("model", registry.add_artifact("checkpoint", folder))

    children = [in_child(lambda process=process: publish(process)) for process in range(num_processes)]
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in children)
    assert failed == 0, f"{failed} processes ended with an error"
    versions = Registry(root).versions()
    assert [version.number for version in versions] == list(range(1, num_processes * num_each + 1))
    assert len({version.digest for version in versions}) == len(versions)
    assert Registry.examine(root) == []
    return {"versions": len(versions)}


@contextmanager
def new_registry(socket_folder: str | None) -> Iterator[tuple[Path, Path]]:
    """An empty registry with either database, and a folder beside it."""
    with tempfile.TemporaryDirectory(prefix="bitsmith-drill-") as folder:
        root, work = Path(folder) / "registry", Path(folder) / "work"
        work.mkdir()
        RegistrySettings(postgresql.new_database(socket_folder) if socket_folder else None).write(root)
        yield root, work


def add_databases(parser: argparse.ArgumentParser) -> None:
    """The option that all drills have."""
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])


def databases_of(asked: argparse.Namespace) -> list[str]:
    """Those asked for; ends the program, and says why, where one is not installed."""
    if "postgresql" in asked.databases and postgresql.programs() is None:
        sys.exit(postgresql.MISSING)
    return asked.databases


def drill_databases(databases: Iterable[str], *, num_kills: int, num_processes: int, num_each: int) -> dict[str, int]:
    """database -> versions that were acknowledged; none of them lost."""
    acknowledged = {}
    for database in databases:
        with postgresql.server() if database == "postgresql" else nullcontext(None) as socket_folder:
            started = time.monotonic()
            with new_registry(socket_folder) as (root, work):
                found = drill_kills(root, work, num_kills)
            print(f"{database}: {num_kills} kills in {time.monotonic() - started:.0f} s, {found}", flush=True)
            started = time.monotonic()
            with new_registry(socket_folder) as (root, work):
                many = drill_processes(root, work, num_processes, num_each)
            seconds = time.monotonic() - started
            print(f"{database}: {num_processes} processes in {seconds:.0f} s, {many}", flush=True)
        acknowledged[database] = found["acknowledged"] + many["versions"]
    return acknowledged


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--versions", type=int, default=50, help="each process")
    add_databases(parser)
    asked = parser.parse_args()
    acknowledged = drill_databases(
        databases_of(asked), num_kills=asked.kills, num_processes=asked.processes, num_each=asked.versions
    )
    total = sum(acknowledged.values())
    print(f"{asked.kills} kills and {asked.processes} x {asked.versions} versions: {total} acknowledged, 0 lost")


if __name__ == "__main__":
    main()
