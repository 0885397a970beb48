"""What a run will write, held against the disk before it begins: what is there already is not asked for again."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import statistics
from pipeline.compress import compress
from pipeline.disk_space import (
    check_disk,
    checkpoint_disk_bytes,
    disk_bytes,
    shared_disk_bytes,
    stage_disk_bytes,
    statistics_disk_bytes,
)
from pipeline.errors import DiskSpaceError
from pipeline.forecast import forecast
from pipeline.home import home
from pipeline.progress import SILENT
from pipeline.recipe import Recipe
from pipeline.run import Run
from pipeline.stages import StageLog
from pipeline.sweep import compress_budgets
from registry import Registry
from tests.pipeline.small import SMALL

HEADER_BYTES = 2000  # of a file of tensors, which for so small ones is not next to nothing
pytestmark = pytest.mark.usefixtures("quick")


def opened(model_dir: Path, registry: Registry, *, resume: bool = True, **settings) -> Run:
    recipe = Recipe.of(model=str(model_dir), **(SMALL | settings))
    return Run.prepare(recipe, registry, device="cpu", resume=resume, log=StageLog(), progress=SILENT)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set how much room there seems to be."""
    return lambda nbytes: monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=nbytes))


def test_no_stage_leaves_more_than_its_forecast(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path / "home"))  # others' answers are in that of all tests
    registry = Registry(tmp_path / "registry")
    run = opened(tiny_model_dir, registry, embeddings="lloyd4-g32-s6", recover=True, recover_samples=8)
    expected = stage_disk_bytes(run)
    assert {each.name: each.disk_bytes for each in forecast(run) if each.disk_bytes} == expected
    assert sum(expected.values()) == disk_bytes(run)
    compress(run.recipe, registry, tmp_path / "out")

    def tensors(*kinds: str) -> int:
        files = [file for kind in kinds for made in registry.of_kind(kind) for file in made.files.items()]
        return sum(entry.size_bytes - HEADER_BYTES for name, entry in files if name.endswith(".safetensors"))

    written = {
        "statistics": tensors("statistics"),
        "decompose": tensors("matrices", "embedding"),
        "recover": tensors("teacher", "recovered"),
        "checkpoint": 2 * tensors("checkpoint"),
        "evaluate": sum(path.stat().st_size - HEADER_BYTES for path in (home() / "logits").rglob("*.logprobs")),
    }
    assert {stage: size for stage, size in written.items() if not 0 < size <= expected[stage]} == {}


def test_a_finished_folder_asks_for_no_room(tiny_model_dir: Path, tmp_path: Path, free) -> None:
    recipe, registry = Recipe.of(model=str(tiny_model_dir), **SMALL), Registry(tmp_path / "registry")
    compress(recipe, registry, tmp_path / "out")
    lower = recipe.model_copy(update={"budget": "4bpw"})
    compress_budgets([recipe, lower], registry, tmp_path / "several")
    free(0)
    assert compress(recipe, registry, tmp_path / "out").was_finished
    assert compress_budgets([recipe, lower], registry, tmp_path / "several").was_finished
    with pytest.raises(DiskSpaceError):
        compress(recipe, registry, tmp_path / "another")


def test_statistics_that_are_there_are_not_asked_for_again(
    tiny_model_dir: Path, tmp_path: Path, free, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "registry")
    run = opened(tiny_model_dir, registry, sensitivity="kronecker")
    whole = checkpoint_disk_bytes(run) + shared_disk_bytes(run)
    free(whole - 1)
    with pytest.raises(DiskSpaceError):
        check_disk([run], tmp_path / "out")

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(statistics, "measure_scales", stop)
        with pytest.raises(KeyboardInterrupt):
            run.statistics()
    assert 0 < run.statistics_work_bytes() < statistics_disk_bytes(run)
    free(whole - run.statistics_work_bytes())
    check_disk([run], tmp_path / "out")
    free(whole - run.statistics_work_bytes() - 1)
    with pytest.raises(DiskSpaceError):
        check_disk([run], tmp_path / "out")

    run.statistics()
    free(whole - statistics_disk_bytes(run))
    check_disk([run], tmp_path / "out")
    with pytest.raises(DiskSpaceError):
        check_disk([opened(tiny_model_dir, registry, resume=False, sensitivity="kronecker")], tmp_path / "out")


def test_statistics_that_take_most_of_it_are_named(tiny_model_dir: Path, tmp_path: Path, free) -> None:
    free(1000)
    settings = {"num_samples": 1, "seq_len": 8, "eval_windows": 0}
    large, small = (
        opened(tiny_model_dir, Registry(tmp_path / "registry"), sensitivity=metric, **settings)
        for metric in ("kronecker", "factored")
    )
    with pytest.raises(DiskSpaceError, match=r"of it are statistics, of which `--sensitivity factored` would write"):
        check_disk([large], tmp_path / "out")
    with pytest.raises(DiskSpaceError) as refused:
        check_disk([small], tmp_path / "out")
    assert "sensitivity" not in str(refused.value)


def test_windows_that_check_the_scale_pass_at_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    """An eighth of them, which are more than a part where there are many."""
    registry, width, num_layers = Registry(tmp_path / "registry"), 64, 2
    of_many = {
        metric: statistics_disk_bytes(opened(tiny_model_dir, registry, sensitivity=metric, num_samples=96, seq_len=8))
        for metric in ("kronecker", "sequence", "fisher", "input")
    }
    of_part = {
        metric: statistics_disk_bytes(opened(tiny_model_dir, registry, sensitivity=metric, num_samples=8, seq_len=8))
        for metric in of_many
    }
    more = 4 * (num_layers + 3) * width * (96 // 8 - 8) * 8
    assert {metric: of_many[metric] - of_part[metric] for metric in of_many} == {
        "kronecker": more,
        "sequence": more,
        "fisher": 0,
        "input": 0,
    }
