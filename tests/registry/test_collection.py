"""Garbage goes; what a version, an alias, a running step, a living process or the grace needs stays."""

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import update

from registry import Artifact, Collected, IndexLostError, Registry
from registry.collection import _remove_locks
from registry.lock import exclusive
from registry.schema import artifacts

ROOT = Path(__file__).parents[2]
HOUR, DAY = 3600.0, 86400.0


def make(registry: Registry, folder: Path, kind: str = "matrices", parents: tuple[str, ...] = ()) -> Artifact:
    return registry.add_artifact(kind, folder, parents)


def collect(registry: Registry, **options: bool) -> Collected:
    return registry.collect_garbage(grace_seconds=HOUR / 2, **options)


def num_blobs(registry: Registry) -> int:
    return len(list(registry.store.blobs()))


def age(registry: Registry) -> None:
    """Let everything that is there now be an hour older, and need nothing of it in this process."""
    registry._uses.close()
    then = time.time() - HOUR
    with registry._index.database.writing() as connection:
        moment = datetime.fromtimestamp(then, UTC).isoformat(timespec="seconds")
        connection.execute(update(artifacts).values(used_at=moment))
    for path in registry.root.rglob("*"):
        if "index.sqlite" not in path.name:
            os.utime(path, (then, then))


def test_what_versions_need_stays_and_the_rest_goes(registry: Registry, make_folder) -> None:
    statistics = make(registry, make_folder({"s": b"statistics", "same": b"same"}))
    checkpoint = make(registry, make_folder({"w": b"weights"}), "checkpoint", (statistics.digest, "ab" * 32))
    report = make(registry, make_folder({"r": b"report"}), "evaluation", (checkpoint.digest,))
    registry.publish("model", checkpoint, report)
    garbage = make(registry, make_folder({"g": b"garbage", "same": b"same"}), parents=(statistics.digest,))
    child = make(registry, make_folder({"c": b"child"}), parents=(garbage.digest,))
    age(registry)
    promised = collect(registry, dry_run=True)
    assert num_blobs(registry) == 6
    assert registry.get(garbage.digest) == garbage
    found = collect(registry)
    assert found == promised
    assert set(found.artifacts) == {garbage, child}
    assert (found.num_blobs, found.size_bytes) == (2, len(b"garbage") + len(b"child"))
    assert num_blobs(registry) == 4
    assert registry.verify("model").ok
    assert registry.lineage(report.digest).artifacts == (report, checkpoint, statistics)
    assert all(registry.store.has(entry) for entry in statistics.files.values())
    assert collect(registry) == Collected((), 0, (), 0)


def test_the_grace_keeps_what_was_used_lately(registry: Registry, make_folder) -> None:
    old = make(registry, make_folder({"a": b"old"}))
    parent = make(registry, make_folder({"a": b"parent"}))
    age(registry)
    young = make(registry, make_folder({"a": b"young"}), parents=(parent.digest,))
    found = collect(registry)
    assert found.artifacts == (old,)
    assert registry.get(young.digest) == young
    assert registry.get(parent.digest) == parent
    assert registry.collect_garbage(grace_seconds=DAY).artifacts == ()


def test_a_step_found_again_counts_as_used(registry: Registry) -> None:
    def build(workdir: Path) -> None:
        (workdir / "out").mkdir()
        (workdir / "out" / "file").write_bytes(b"1")

    made = registry.step("matrices", [], {"bits": 3}, build)
    age(registry)
    again = Registry(registry.root)
    assert again.step("matrices", [], {"bits": 3}, build) == made
    again._uses.close()
    assert collect(registry).artifacts == ()
    age(registry)
    assert collect(registry).artifacts == (made,)
    assert registry.has_step("matrices", [], {"bits": 3}) is None


STEPS = """
import sys
from pathlib import Path
from registry import Registry

def build(workdir):
    (workdir / "out").mkdir(exist_ok=True)
    (workdir / "out" / "file").write_bytes(sys.argv[2].encode())

def slow(workdir):
    (workdir / "half").write_bytes(b"half done")
    print("building", flush=True)
    sys.stdin.readline()
    build(workdir)

registry = Registry(Path(sys.argv[1]))
first = registry.step("statistics", [], {}, build)
print(first.digest, flush=True)
sys.stdin.readline()
second = registry.step("costs", [first.digest], {}, slow)
print(second.digest, flush=True)
sys.stdin.readline()
"""


def test_a_living_process_keeps_what_it_made_and_what_it_works_on(registry: Registry) -> None:
    pipe, command = subprocess.PIPE, [sys.executable, "-c", STEPS, str(registry.root), "content"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdin is not None

        def answer() -> str:
            process.stdin.write("\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        first = process.stdout.readline().strip()
        age(registry)
        assert collect(registry) == Collected((), 0, (), 0), "between two steps"
        assert answer() == "building"
        age(registry)
        assert collect(registry) == Collected((), 0, (), 0), "within a step"
        second = answer()
        age(registry)
        assert collect(registry) == Collected((), 0, (), 0), "after a step"
        assert registry.get(second).parents == (first,)
        process.send_signal(signal.SIGKILL)
    found = collect(registry)
    assert {artifact.digest for artifact in found.artifacts} == {first, second}
    assert list((registry.root / "uses").iterdir()) == []


def test_a_process_that_ends_well_leaves_no_list(registry: Registry) -> None:
    command = [sys.executable, "-c", STEPS, str(registry.root), "content"]
    subprocess.run(command, input="\n" * 3, stdout=subprocess.DEVNULL, text=True, cwd=ROOT, check=True)
    assert list((registry.root / "uses").iterdir()) == []


def test_the_work_of_a_dead_process_goes_after_the_grace(registry: Registry) -> None:
    pipe, command = subprocess.PIPE, [sys.executable, "-c", STEPS, str(registry.root), "content"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == "building"
        process.send_signal(signal.SIGKILL)
    (folder,) = (registry.root / "steps").glob("*/")
    assert registry.collect_garbage(grace_seconds=DAY).folders == ()
    assert folder.exists()
    age(registry)
    found = collect(registry)
    assert found.folders == (folder,)
    assert found.size_bytes == len(b"half done") + len(b"content")
    assert list((registry.root / "steps").iterdir()) == []


def test_remains_of_killed_copies_and_downloads_go(registry: Registry, checkpoint: Artifact) -> None:
    registry.publish("model", checkpoint)
    (registry.root / "blobs" / "incoming" / "half").write_bytes(b"123")
    pulled = registry.root / "pulls" / "tmpx" / "files"
    pulled.mkdir(parents=True)
    (pulled / "part").write_bytes(b"45")
    age(registry)
    found = collect(registry)
    assert (found.num_blobs, found.folders, found.size_bytes) == (1, (pulled.parent,), 5)
    assert registry.verify("model").ok


def test_locks_that_killed_processes_left_go_and_held_ones_stay(registry: Registry) -> None:
    steps = registry.root / "steps"
    steps.mkdir()
    left, held, of_work = (steps / f"{letter * 64}.lock" for letter in "abc")
    for lock in (left, held, of_work):
        lock.touch()
    of_work.with_suffix("").mkdir()
    with exclusive(held):
        registry.collect_garbage(grace_seconds=DAY, dry_run=True)
        assert left.exists()
        registry.collect_garbage(grace_seconds=DAY)
        assert sorted(steps.glob("*.lock")) == [held]
    assert of_work.with_suffix("").exists()


def test_who_is_about_to_hold_a_lock_does_not_lose_it_to_a_collection(registry: Registry) -> None:
    """Collections remove the lock all the time, and two at once would show in the number that each reads and writes."""
    lock, number = registry.root / "steps" / f"{'a' * 64}.lock", registry.root / "number"
    lock.parent.mkdir()
    number.write_text("0")
    is_over = threading.Event()

    def count() -> None:
        for _ in range(300):
            with exclusive(lock):
                number.write_text(str(int(number.read_text()) + 1))

    def collect_locks() -> None:
        while not is_over.is_set():
            _remove_locks(lock.parent)

    collector, counters = threading.Thread(target=collect_locks), [threading.Thread(target=count) for _ in range(3)]
    for thread in (collector, *counters):
        thread.start()
    for thread in counters:
        thread.join(60)
    is_over.set()
    collector.join(60)
    assert number.read_text() == "900"


ANOTHER_CLOCK = """
import datetime, sys, time
real, seconds = time.time, float(sys.argv[3])
class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(real() + seconds, tz)
datetime.datetime, time.time = Clock, lambda: real() + seconds
from pathlib import Path
from registry import Registry
registry = Registry(Path(sys.argv[1]))
if sys.argv[2] == "gc":
    registry.collect_garbage(grace_seconds=86400)
else:
    artifact = registry.add_artifact("checkpoint", Path(sys.argv[2]))
    print(artifact.digest if sys.argv[4] == "add" else registry.publish("model", artifact))
"""


def with_clock(days: float, registry: Registry, what: object, then: str = "") -> str:
    command = [sys.executable, "-c", ANOTHER_CLOCK, str(registry.root), str(what), str(days * DAY), then]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def test_clocks_that_differ_by_weeks_cost_nothing(registry: Registry, make_folder) -> None:
    added = with_clock(-20, registry, make_folder({"a": b"slow"}), "add")
    with_clock(20, registry, "gc")
    with_clock(0, registry, "gc")
    assert registry.get(added).kind == "checkpoint"
    assert num_blobs(registry) == 1
    for number, days in enumerate((0, -20, 20, -40), start=1):
        folder = make_folder({"a": b"version %d" % number})
        assert with_clock(days, registry, folder, "publish") == f"model:{number}", "the order is that of publishing"
    assert str(registry.version("model")) == "model:4"


def test_what_a_living_process_added_stays_whatever_its_clock_says(registry: Registry, make_folder) -> None:
    artifact = make(registry, make_folder({"a": b"1"}))
    then = time.time() - 30 * DAY
    with registry._index.database.writing() as connection:
        moment = datetime.fromtimestamp(then, UTC).isoformat(timespec="seconds")
        connection.execute(update(artifacts).values(used_at=moment))
    for blob in registry.store.blobs():
        os.utime(blob, (then, then))
    assert Registry(registry.root).collect_garbage(grace_seconds=DAY).artifacts == ()
    assert str(registry.publish("model", artifact)) == "model:1"


def test_a_lost_index_does_not_cost_the_blobs(tmp_path: Path, make_folder) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish("model", make(registry, make_folder({"a": b"1"})))
    for path in registry.root.glob("index.sqlite*"):
        path.unlink()
    with pytest.raises(IndexLostError):
        Registry(registry.root).collect_garbage(grace_seconds=0)
    assert num_blobs(registry) == 1


def test_a_collection_waits_for_who_adds(registry: Registry, make_folder, monkeypatch) -> None:
    """The blob is in the store and the index does not know it yet: a collection that came in now would remove it."""
    adding, may_go_on = threading.Event(), threading.Event()
    record = registry._index.add_artifact

    def slow(artifact: Artifact) -> None:
        adding.set()
        assert may_go_on.wait(30)
        record(artifact)
        registry._uses.close()

    monkeypatch.setattr(registry._index, "add_artifact", slow)
    made: list[Artifact] = []
    adder = threading.Thread(target=lambda: made.append(make(registry, make_folder({"a": b"1"}))))
    adder.start()
    assert adding.wait(30)
    found: list[Collected] = []
    other = Registry(registry.root)
    collector = threading.Thread(target=lambda: found.append(other.collect_garbage(grace_seconds=-5)))
    collector.start()
    collector.join(0.5)
    assert collector.is_alive()
    may_go_on.set()
    adder.join(30)
    collector.join(30)
    assert found[0].artifacts == tuple(made)
    assert num_blobs(registry) == 0


ADD = """
import os, sys
from pathlib import Path
from registry import Registry
registry = Registry(Path(sys.argv[1]))
for number in range(6):
    folder = Path(sys.argv[2]) / f"{os.getpid()}-{number}"
    folder.mkdir()
    (folder / "own").write_text(f"{sys.argv[3]} {number}")
    (folder / "shared").write_text(f"shared {number % 3}")
    registry.publish("model", registry.add_artifact("checkpoint", folder))
"""


def test_processes_add_while_others_collect(registry: Registry, tmp_path: Path) -> None:
    """The grace covers the moment between adding and publishing."""
    command = [sys.executable, "-c", ADD, str(registry.root), str(tmp_path)]
    adders = [subprocess.Popen([*command, str(number)], cwd=ROOT) for number in range(3)]
    while any(adder.poll() is None for adder in adders):
        registry.collect_garbage(grace_seconds=60)
    assert [adder.returncode for adder in adders] == [0] * 3
    assert [version.number for version in registry.versions()] == list(range(1, 19))
    assert all(registry.verify(str(version)).ok for version in registry.versions())
