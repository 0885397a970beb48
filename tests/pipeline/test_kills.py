"""A run that is killed, at every stage: the next one ends in the same bytes."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import RecipeChangedError
from registry import Registry
from tests.pipeline.small import be_quick
from tests.pipeline.test_compress import contents, run

pytestmark = pytest.mark.usefixtures("quick")

# A child process counts calls of one function and kills itself at one of them. In the order of the work.
KILL_POINTS = {
    "statistics": ("pipeline.summed_parts", "write_layer", 2),
    "costs": ("pipeline.costs", "measure_matrix", 4),
    "plan": ("pipeline.allocation.Plan", "write", 1),
    "decompose": ("pipeline.decompose", "weighted_error", 4),
    "checkpoint": ("pipeline.safetensors_file.SafetensorsFile", "write", 1),
    "materialize": ("registry.registry.Registry", "materialize", 1),
    "audit": ("pipeline.run", "audit", 1),
    "finish": ("pipeline.output.OutputFolder", "finish", 1),
    "logits": ("pipeline.base_logits", "write_window", 2),
    "evaluate": ("pipeline.evaluate", "_keep", 2),
    "report": ("pipeline.run", "write_report", 1),
    "add report": ("pipeline.output.OutputFolder", "add_report", 1),
    "publish": ("registry.registry.Registry", "publish", 1),
}
AFTER_DELIVERY = ("logits", "evaluate", "report", "add report", "publish")


def find_owner(path: str) -> Any:
    """The module or class of that name."""
    import importlib

    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def _child(model: str, place: str, home: str, kill_point: str | None, signal_number: int) -> None:
    os.environ["BITSMITH_HOME"] = home
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    torch.set_num_threads(1)
    be_quick()
    if kill_point is not None:
        owner_path, name, at = KILL_POINTS[kill_point]
        owner, calls = find_owner(owner_path), []
        real = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal_number)
            return real(*args, **kwargs)

        setattr(owner, name, counting)
    try:
        run(Path(model), Path(place))
    except KeyboardInterrupt:
        os._exit(130)


@pytest.fixture(scope="module")
def children():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.compress", "tests.pipeline.test_kills"])
    return context


def _run_child(children, *args: Any) -> int | None:
    process = children.Process(target=_child, args=args)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


@pytest.fixture(scope="module")
def unbroken(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run leaves that nobody killed."""
    place = tmp_path_factory.mktemp("unbroken")
    return contents(run(tiny_model_dir, place).folder)


def _check_finished(place: Path, unbroken: dict[str, bytes]) -> None:
    assert contents(place / "out") == unbroken
    assert not (place / "out.partial").exists()
    assert [str(version) for version in Registry(place / "registry").versions()] == ["out:1"]
    assert Registry(place / "registry").verify("out").ok


def test_a_run_that_is_killed_at_every_stage_ends_in_the_same_bytes(
    children, unbroken: dict[str, bytes], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Each run goes on from where the one before was killed."""
    args = (str(tiny_model_dir), str(tmp_path), str(tmp_path / "home"))
    for kill_point in KILL_POINTS:
        assert _run_child(children, *args, kill_point, signal.SIGKILL) == -signal.SIGKILL, kill_point
        assert Registry(tmp_path / "registry").versions() == [], kill_point
        is_delivered = kill_point in AFTER_DELIVERY
        assert (tmp_path / "out").exists() == is_delivered, kill_point
    assert _run_child(children, *args, None, 0) == 0
    _check_finished(tmp_path, unbroken)


@pytest.mark.parametrize(
    ("kill_point", "files"),
    [("statistics", "layer-*.safetensors"), ("costs", "model.*.json"), ("decompose", "model.*.safetensors")],
)
def test_unfinished_work_that_was_changed_is_done_again(
    children, unbroken: dict[str, bytes], tiny_model_dir: Path, tmp_path: Path, kill_point: str, files: str
) -> None:
    args = (str(tiny_model_dir), str(tmp_path), str(tmp_path / "home"))
    assert _run_child(children, *args, kill_point, signal.SIGKILL) == -signal.SIGKILL
    (changed, *_) = sorted((tmp_path / "registry" / "steps").rglob(files))
    content = changed.read_bytes()
    digit = max(place for place, byte in enumerate(content) if chr(byte).isdigit())
    changed.write_bytes(content[:digit] + (b"7" if content[digit] != ord("7") else b"8") + content[digit + 1 :])
    assert _run_child(children, *args, None, 0) == 0
    _check_finished(tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("kill_point", list(KILL_POINTS))
def test_after_one_kill_the_next_run_ends_in_the_same_bytes(
    kill_point: str, children, unbroken: dict[str, bytes], tiny_model_dir: Path, tmp_path: Path
) -> None:
    args = (str(tiny_model_dir), str(tmp_path), str(tmp_path / "home"))
    assert _run_child(children, *args, kill_point, signal.SIGKILL) == -signal.SIGKILL
    assert _run_child(children, *args, None, 0) == 0
    _check_finished(tmp_path, unbroken)


def test_ctrl_c_leaves_work_to_go_on_from(
    children, unbroken: dict[str, bytes], tiny_model_dir: Path, tmp_path: Path
) -> None:
    args = (str(tiny_model_dir), str(tmp_path), str(tmp_path / "home"))
    for kill_point in ("statistics", "costs", "decompose", "evaluate"):
        assert _run_child(children, *args, kill_point, signal.SIGINT) == 130, kill_point
    assert _run_child(children, *args, None, 0) == 0
    _check_finished(tmp_path, unbroken)


def test_shards_that_are_written_stay(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import checkpoint
    from pipeline.safetensors_file import SafetensorsFile

    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 30_000)
    written, stop_at, write = [], 2, SafetensorsFile.write

    def counting(file: SafetensorsFile, path: Path, read: Any) -> None:
        if len(written) == stop_at:
            raise KeyboardInterrupt
        write(file, path, read)
        written.append(path.name)

    monkeypatch.setattr(SafetensorsFile, "write", counting)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model_dir, tmp_path)
    stop_at = -1
    done = run(tiny_model_dir, tmp_path)
    assert len(written) == len(list(done.folder.glob("*.safetensors"))) > 2
    assert done.version.digest == run(tiny_model_dir, tmp_path / "again").version.digest


def test_an_unfinished_run_with_another_recipe_is_refused(children, tiny_model_dir: Path, tmp_path: Path) -> None:
    args = (str(tiny_model_dir), str(tmp_path), str(tmp_path / "home"))
    assert _run_child(children, *args, "decompose", signal.SIGKILL) == -signal.SIGKILL
    with pytest.raises(RecipeChangedError, match=r"unfinished run.*budget was '4\.5bpw' and is now '3bpw'"):
        run(tiny_model_dir, tmp_path, budget="3bpw")
    done = run(tiny_model_dir, tmp_path, budget="3bpw", resume=False)
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["budget"] == "3bpw"
    assert done.plan.bits_per_param <= 3
