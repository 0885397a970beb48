"""Two processes on one output folder, and names that are none."""

import threading
from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.home import output_path
from pipeline.output import OutputFolder
from registry import Artifact, Registry

RECIPE = {"model": "m", "budget": "3bpw"}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def checkpoint(registry: Registry, tmp_path: Path) -> Artifact:
    folder = tmp_path / "made"
    folder.mkdir()
    for name in ("recipe.json", "config.json", "model.safetensors"):
        (folder / name).write_text('{"model": "m", "budget": "3bpw"}')
    return registry.add_artifact("checkpoint", folder)


def test_who_comes_second_waits_and_finds_the_folder_whole(
    registry: Registry, checkpoint: Artifact, tmp_path: Path
) -> None:
    first, second = (OutputFolder(tmp_path / "out", RECIPE) for _ in range(2))
    found: list[bool] = []
    first.claim(resume=True)
    waits = threading.Event()

    def follow() -> None:
        with second.alone(waits.set):
            found.append(second.is_finished())

    with first.alone():
        first.stage(registry, checkpoint)
        follower = threading.Thread(target=follow)
        follower.start()
        assert waits.wait(30)
        first.finish()
    follower.join(30)
    assert found == [True]
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(checkpoint.files)
    second.claim(resume=True)
    assert not list(tmp_path.glob("out.partial")) + list(tmp_path.glob(".out*"))


def test_a_finished_folder_is_claimed_where_nobody_can_write(
    registry: Registry, checkpoint: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = OutputFolder(tmp_path / "out", RECIPE)
    output.claim(resume=True)
    output.stage(registry, checkpoint)
    output.finish()
    monkeypatch.setattr(OutputFolder, "alone", lambda *_: pytest.fail("a lock is a file"))
    output.claim(resume=True)


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert output_path(".").name == "here"
    assert output_path("below/..").name == "here"
    assert output_path("below") == Path("below")
    with pytest.raises(RecipeError, match="home folder of nobody"):
        output_path("~nosuchuser/out")
