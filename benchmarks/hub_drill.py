"""Drill of the Hub: kill -9 at random points of push and pull, against the tests' server on the loopback interface.

    python -m benchmarks.hub_drill [--kills 200] [--databases sqlite postgresql]

After a kill nobody may see half a version: main is empty or whole, a tag names a whole commit, the pulling registry has
the version or has it not. Then the command that was cut short runs again and must complete, in one commit and without
anything left on the way. Exits with 1 otherwise.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

# what a child would else import first, and be killed at
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import disable_progress_bars

import registry.opening  # noqa: F401
from benchmarks.registry_drill import add_databases, databases_of, in_child
from registry import Registry, pull, push
from registry.publication import MANIFEST
from registry.settings import RegistrySettings
from tests import postgresql
from tests.registry.hub_server import WRITE_TOKEN, HubServer

MOST_SECONDS = 0.4  # between a start and its kill
FILES = {"config.json": 200, "model-1.safetensors": 1_500_000, "model-2.safetensors": 700_000}
WHOLE = {".gitattributes", "README.md", MANIFEST, *FILES}


@contextmanager
def server() -> Iterator[str]:
    """A Hub in a process of its own; its endpoint."""
    reader, writer = os.pipe()

    def serve() -> None:
        with HubServer() as hub:
            os.write(writer, hub.endpoint.encode())
            signal.pause()

    child = in_child(serve)
    try:
        yield os.read(reader, 1000).decode()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def drill_hub(work: Path, num_kills: int, *, socket_folder: str | None = None, seed: int = 0) -> dict[str, int]:
    """Kill `num_kills` times; how many were cut short, and where. AssertionError if anything is half there.

    Args:
        socket_folder: of a PostgreSQL server, for the registries' indexes; SQLite without.
    """
    constants.HF_HUB_DISABLE_XET = True
    disable_progress_bars()
    draw = random.Random(seed)
    counts = {"pushes": 0, "pulls": 0, "completed before the kill": 0}
    with server() as endpoint:
        for number in range(num_kills):
            one = _Trial(work / str(number), endpoint, f"alice/drill-{number}")
            for place in ("mine", "theirs"):
                database = postgresql.new_database(socket_folder) if socket_folder else None
                (work / str(number) / place).mkdir(parents=True)
                RegistrySettings(database).write(work / str(number) / place)
            must_end_well(one.make)
            is_push = draw.random() < 0.5
            counts["pushes" if is_push else "pulls"] += 1
            if not is_push:
                must_end_well(one.push)
            command = one.push if is_push else one.pull
            child = in_child(command)
            time.sleep(draw.uniform(0.0, MOST_SECONDS))
            os.kill(child, signal.SIGKILL)
            counts["completed before the kill"] += os.waitpid(child, 0)[1] == 0
            must_end_well(one.is_not_half_there)
            must_end_well(command)
            must_end_well(one.is_there if is_push else one.is_here)
    return counts


class _Trial:
    def __init__(self, folder: Path, endpoint: str, repo_id: str) -> None:
        self.folder, self.endpoint, self.repo_id = folder, endpoint, repo_id
        self.settings = {"endpoint": endpoint, "token": WRITE_TOKEN}

    def make(self) -> None:
        """A version to push."""
        files = self.folder / "files"
        files.mkdir()
        for name, size_bytes in FILES.items():
            (files / name).write_bytes(random.Random(name + self.repo_id).randbytes(size_bytes))
        registry = Registry(self.folder / "mine")
        registry.publish("tiny", registry.add_artifact("checkpoint", files))
        Registry(self.folder / "theirs").versions()

    def push(self) -> None:
        push(Registry(self.folder / "mine"), "tiny", self.repo_id, card="# Tiny\n", **self.settings)

    def pull(self) -> None:
        """As `bitsmith pull -o`."""
        theirs = Registry(self.folder / "theirs")
        version = pull(self.repo_id, theirs, **self.settings).version
        theirs.materialize(theirs.get(version.digest), self.folder / "out")

    def is_not_half_there(self) -> None:
        """Whatever was killed, and wherever."""
        for version in (theirs := Registry(self.folder / "theirs")).versions():
            theirs.verify(str(version)).raise_if_damaged()
        api = HfApi(**self.settings)
        if not api.repo_exists(self.repo_id):
            return
        for commit in ["main", *(tag.target_commit for tag in api.list_repo_refs(self.repo_id).tags)]:
            found = set(api.list_repo_files(self.repo_id, revision=commit))
            assert found == WHOLE or (commit == "main" and found == {".gitattributes"}), f"{commit} has {found}"

    def is_there(self) -> None:
        """By one commit on the first, with its tag, and no branch beside main."""
        api = HfApi(**self.settings)
        refs = api.list_repo_refs(self.repo_id)
        assert [branch.name for branch in refs.branches] == ["main"], f"left on the way: {refs.branches}"
        assert [tag.name for tag in refs.tags] == ["v1"]
        assert len(api.list_repo_commits(self.repo_id)) == 2
        assert set(api.list_repo_files(self.repo_id, revision=refs.tags[0].target_commit)) == WHOLE
        assert Registry.examine(self.folder / "mine") == []

    def is_here(self) -> None:
        """Whole, and nothing is left on the way."""
        theirs = Registry(self.folder / "theirs")
        assert [version.number for version in theirs.versions()] == [1]
        theirs.verify(str(theirs.versions()[0])).raise_if_damaged()
        assert Registry.examine(self.folder / "theirs") == []
        assert list((self.folder / "theirs" / "pulls").iterdir()) == []
        assert {path.name: path.stat().st_size for path in (self.folder / "out").iterdir()} == FILES


def must_end_well(work: Callable[[], None]) -> None:
    """In a process of its own: connections do not survive a fork."""
    assert os.waitpid(in_child(work), 0)[1] == 0, work.__name__


def drill_hub_on(databases: Iterable[str], num_kills: int) -> None:
    """`drill_hub` with the registries' indexes in each of the databases."""
    for database in databases:
        with (
            postgresql.server() if database == "postgresql" else nullcontext(None) as socket_folder,
            tempfile.TemporaryDirectory(prefix="bitsmith-drill-") as work,
        ):
            started = time.monotonic()
            counts = drill_hub(Path(work), num_kills, socket_folder=socket_folder)
            seconds = time.monotonic() - started
        what = f"{num_kills} kills of push and pull in {seconds:.0f} s, {json.dumps(counts)}"
        print(f"{database}: {what}: 0 half there", flush=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    add_databases(parser)
    asked = parser.parse_args()
    drill_hub_on(databases_of(asked), asked.kills)


if __name__ == "__main__":
    main()
