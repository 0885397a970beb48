"""Laws of steps: made once, resumed after a kill, never made by two at once, rebuilt if damaged."""

import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.atomic import replace_file
from registry import Artifact, Registry, RegistryError
from registry.store import Store, hash_file

PARENTS = ["ab" * 32]
SETTINGS = {"bits": 3, "rank": 8}


class Builder:
    """Writes three parts into the work folder and counts what it had to do."""

    def __init__(self, fail_after: int = 99) -> None:
        self.num_calls = 0
        self.made: list[int] = []
        self.fail_after = fail_after

    def __call__(self, workdir: Path) -> dict[str, int]:
        self.num_calls += 1
        out = workdir / "out"
        out.mkdir(exist_ok=True)
        for part in range(3):
            if (out / f"part{part}").exists():
                continue
            if part == self.fail_after:
                raise ZeroDivisionError("in the middle")
            (out / f"part{part}").write_bytes(bytes([part]) * 100)
            self.made.append(part)
        (workdir / "scratch").write_bytes(b"not part of the result")
        return {"num_parts": 3}


def step(registry: Registry, build, **changes) -> Artifact:
    return registry.step("matrices", PARENTS, SETTINGS, build, **changes)


def test_a_step_is_built_once(registry: Registry):
    build = Builder()
    assert registry.has_step("matrices", PARENTS, SETTINGS) is None
    first = step(registry, build)
    assert step(registry, build) == first
    assert Registry(registry.root).has_step("matrices", PARENTS, SETTINGS) == first
    assert build.num_calls == 1
    assert sorted(first.files) == ["part0", "part1", "part2"]
    assert first.parents == tuple(PARENTS)
    assert dict(first.metadata) == {"settings": SETTINGS, "num_parts": 3}
    assert list((registry.root / "steps").iterdir()) == []


def test_large_files_are_read_again_by_whoever_uses_them_and_once(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.step.REHASH_LIMIT_BYTES", 3)
    monkeypatch.setattr("registry.step.LONG_READ_BYTES", 10)
    hashed: list[Path] = []
    monkeypatch.setattr("registry.store.hash_file", lambda path: hashed.append(path) or hash_file(path))
    said: list[str] = []
    progress = SimpleNamespace(say=said.append)
    made = step(registry, Builder())
    again = Registry(registry.root)
    assert again.has_step("matrices", PARENTS, SETTINGS) == made
    assert hashed == []
    for _ in range(2):
        assert again.finished_step("matrices", PARENTS, SETTINGS, progress) == made
        assert step(again, Builder(), progress=progress) == made
    assert len(hashed) == len(made.files) == 3
    assert said == ["Reading 0.0 GB of matrices that are there already: are they whole?"]
    blob = registry.store.path(made.files["part1"].sha256)
    content = blob.read_bytes()
    blob.chmod(0o644)
    blob.write_bytes(b"x" * len(content))
    assert again.has_step("matrices", PARENTS, SETTINGS) == made, "of the right size"
    assert again.finished_step("matrices", PARENTS, SETTINGS) is None
    build = Builder()
    assert step(again, build) == made
    assert build.num_calls == 1
    assert blob.read_bytes() == content


@pytest.mark.parametrize(
    ("kind", "parents", "settings"),
    [("costs", PARENTS, SETTINGS), ("matrices", [], SETTINGS), ("matrices", PARENTS, SETTINGS | {"rank": 9})],
)
def test_another_kind_parent_or_setting_is_another_step(registry: Registry, kind, parents, settings):
    step(registry, Builder())
    build = Builder()
    registry.step(kind, parents, settings, build)
    assert build.num_calls == 1


class Replacing:
    """Writes three parts as the pipeline does, the second one twice, and stops before the last."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __call__(self, workdir: Path) -> None:
        (workdir / "out").mkdir(exist_ok=True)
        self.found = sorted(path.name for path in (workdir / "out").iterdir())
        for name, content in [("part0", b"0" * 100), ("part1", b"half of it"), ("part1", b"1" * 100)]:
            replace_file(workdir / "out" / name, lambda path, content=content: path.write_bytes(content))
        if not self.found:
            raise ZeroDivisionError("in the middle")
        replace_file(workdir / "out" / "part2", lambda path: path.write_bytes(b"2"))


@pytest.mark.parametrize("content", [b"1" * 100, b"half of it", b"1" * 99 + b"0", b"1" * 50, b""])
def test_work_that_is_not_as_it_was_left_is_not_gone_on_with(registry: Registry, content: bytes) -> None:
    """The second is of a kill between the hash and the name of the second part's other content."""
    said: list[str] = []
    build, progress = Replacing(), SimpleNamespace(say=said.append)
    with pytest.raises(ZeroDivisionError):
        step(registry, build)
    (part,) = (registry.root / "steps").glob("*/out/part1")
    part.write_bytes(content)
    journal = part.parent.parent / ".bitsmith-written"
    journal.write_bytes(journal.read_bytes() + b"\n0123")  # cut off by a kill
    is_as_left = content in (b"1" * 100, b"half of it")
    if is_as_left:
        made = step(registry, build, progress=progress)
        assert build.found == ["part0", "part1"]
        assert said == []
    else:
        with pytest.raises(ZeroDivisionError):
            step(registry, build, progress=progress)
        assert build.found == []
        assert said == [f"The unfinished matrices step is not as it was left ({part} has changed): it begins anew."]
        made = step(registry, build)
    assert sorted(made.files) == ["part0", "part1", "part2"]
    assert registry.store.path(made.files["part1"].sha256).read_bytes() == b"1" * 100
    assert list((registry.root / "steps").iterdir()) == []


def test_files_outside_of_steps_are_not_noted(tmp_path: Path) -> None:
    replace_file(tmp_path / "file", lambda path: path.write_bytes(b"1"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_exception_keeps_the_parts_that_are_done(registry: Registry):
    broken = Builder(fail_after=2)
    with pytest.raises(ZeroDivisionError):
        step(registry, broken)
    assert registry.has_step("matrices", PARENTS, SETTINGS) is None
    build = Builder()
    resumed = step(registry, build)
    assert (broken.made, build.made) == ([0, 1], [2])
    assert resumed == step(Registry(registry.root.parent / "fresh"), Builder())


def test_a_file_that_a_killed_process_was_writing_is_no_part_of_the_result(registry: Registry, tmp_path: Path):
    """Else the same work would have another name after a kill."""
    from pipeline.atomic import replace_file

    def build(work: Path) -> None:
        (work / "out" / "below").mkdir(parents=True, exist_ok=True)
        replace_file(work / "out" / "below" / "part", lambda path: path.write_text("whole"))

    def build_with_leftover(work: Path) -> None:
        build(work)
        begun = []

        def die(path: Path) -> None:
            begun.append(path)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            replace_file(work / "out" / "below" / "other", die)
        begun[0].write_text("ha")  # nobody cleans up after a kill

    undisturbed = Registry(tmp_path / "undisturbed").step("parts", [], {}, build)
    assert registry.step("parts", [], {}, build_with_leftover) == undisturbed


def test_no_resume_starts_from_nothing(registry: Registry):
    with pytest.raises(ZeroDivisionError):
        step(registry, Builder(fail_after=2))
    build = Builder()
    step(registry, build, resume=False)
    assert build.made == [0, 1, 2]
    again = Builder()
    step(registry, again, resume=False)
    assert again.made == [0, 1, 2]


@pytest.mark.parametrize("damage", ["delete", "flip"])
def test_a_damaged_result_is_built_again(registry: Registry, damage: str):
    first = step(registry, Builder())
    blob = registry.path(first, "part1")
    blob.chmod(0o644)
    if damage == "delete":
        blob.unlink()
    else:
        blob.write_bytes(b"x" * 100)
    build = Builder()
    assert step(registry, build) == first
    assert build.num_calls == 1
    registry.store.verify(first.files["part1"], "part1")


def test_a_step_that_leaves_nothing_is_an_error(registry: Registry):
    with pytest.raises(RegistryError, match="out"):
        step(registry, lambda workdir: None)


def test_a_kill_while_the_result_is_taken_in_does_not_build_again(registry: Registry, monkeypatch):
    """Some files are in the store and some still in the work folder: the next run finishes the move."""
    real = Store.adopt
    taken: list[Path] = []

    def die_at_the_second(self, path, entry):
        if taken:
            raise KeyboardInterrupt
        taken.append(path)
        real(self, path, entry)

    monkeypatch.setattr(Store, "adopt", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        step(registry, Builder())
    monkeypatch.undo()
    build = Builder()
    artifact = step(registry, build)
    assert build.num_calls == 0
    for path, entry in artifact.files.items():
        registry.store.verify(entry, path)


def test_a_sealed_result_that_was_changed_meanwhile_is_built_again(registry: Registry, monkeypatch):
    def die(self, path, entry):
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "adopt", die)
    with pytest.raises(KeyboardInterrupt):
        step(registry, Builder())
    monkeypatch.undo()
    (workdir,) = (registry.root / "steps").iterdir()
    (workdir / "out" / "part0").write_bytes(b"changed")
    build = Builder()
    artifact = step(registry, build)
    assert build.made == [0, 1, 2]
    assert registry.path(artifact, "part0").read_bytes() == bytes(100)


KILLED = """
import sys, time
from pathlib import Path
from registry import Registry

def build(workdir):
    out = workdir / "out"
    out.mkdir(exist_ok=True)
    for part in range(3):
        if (out / f"part{part}").exists():
            continue
        if part == 2 and sys.argv[2] == "hang":
            print("hanging", flush=True)
            time.sleep(60)
        (out / f"part{part}").write_bytes(bytes([part]) * 100)
        print("made", part, flush=True)

print(Registry(Path(sys.argv[1])).step("matrices", [], {"bits": 3}, build).digest, flush=True)
"""


def test_a_killed_build_is_resumed_by_the_next_process(registry: Registry):
    command = [sys.executable, "-c", KILLED, str(registry.root)]
    root = Path(__file__).parents[2]
    with subprocess.Popen([*command, "hang"], stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        said = [process.stdout.readline().strip() for _ in range(3)]
        process.send_signal(signal.SIGKILL)
    assert said == ["made 0", "made 1", "hanging"]
    done = subprocess.run([*command, "go"], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.split("\n")[0] == "made 2"
    assert "made 0" not in done.stdout
    uninterrupted = subprocess.run(
        [sys.executable, "-c", KILLED, str(registry.root.parent / "fresh"), "go"],
        capture_output=True, text=True, cwd=root, check=True,
    )  # fmt: skip
    assert done.stdout.split()[-1] == uninterrupted.stdout.split()[-1]


class Listener:
    """A progress display that remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.heard = threading.Event()

    def track(self, items, description, total=None):
        yield from items

    def say(self, message: str) -> None:
        self.said.append(message)
        self.heard.set()


def test_the_second_caller_waits_and_finds_the_result(registry: Registry):
    started, finish = threading.Event(), threading.Event()
    results: dict[str, Artifact] = {}
    listener = Listener()
    second_build = Builder()

    def slow(workdir: Path) -> dict[str, int]:
        started.set()
        assert finish.wait(30)
        return Builder()(workdir)

    def first_caller() -> None:
        results["first"] = step(registry, slow)

    def second_caller() -> None:
        results["second"] = step(Registry(registry.root), second_build, progress=listener)

    first = threading.Thread(target=first_caller)
    first.start()
    assert started.wait(30)
    second = threading.Thread(target=second_caller)
    second.start()
    assert listener.heard.wait(30)
    assert "second" not in results
    finish.set()
    first.join(30)
    second.join(30)
    assert results["first"] == results["second"]
    assert second_build.num_calls == 0
    assert len(listener.said) == 1
    assert "waiting" in listener.said[0]


def test_a_failed_first_caller_lets_the_second_build(registry: Registry):
    started, finish = threading.Event(), threading.Event()
    listener = Listener()
    second_build = Builder()

    def failing(workdir: Path) -> None:
        started.set()
        assert finish.wait(30)
        raise ZeroDivisionError

    def first_caller() -> None:
        with pytest.raises(ZeroDivisionError):
            step(registry, failing)

    first = threading.Thread(target=first_caller)
    first.start()
    assert started.wait(30)
    second = threading.Thread(target=lambda: step(registry, second_build, progress=listener))
    second.start()
    assert listener.heard.wait(30)
    finish.set()
    first.join(30)
    second.join(30)
    assert second_build.num_calls == 1


def test_settings_must_be_plain(registry: Registry):
    with pytest.raises(TypeError, match="rank"):
        registry.step("matrices", [], {"rank": {1, 2}}, Builder())
