"""Matrices on several devices at once, tried with two that are both the CPU; streams are in test_gpu.py."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from pipeline import spread_gpus
from pipeline.decompose import QuantizeMatrix
from pipeline.model import Matrix, Model, open_model
from pipeline.progress import SILENT
from pipeline.recipe import Recipe
from pipeline.run import Run
from pipeline.spread import MatrixTask, over_cores
from pipeline.spread_gpus import over_gpus
from pipeline.stages import StageLog
from registry import Registry
from tests.pipeline.small import SMALL

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_model_dir: Path) -> Model:
    return open_model(str(tiny_model_dir))


@pytest.fixture
def _two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread_gpus, "gpus_of", lambda device: [CPU, CPU])


@dataclass(frozen=True)
class Failing:
    """A MatrixTask that raises the errors in turn, and otherwise leaves an empty file."""

    folder: Path
    errors: Iterator[Exception | None]

    stage: ClassVar[str] = "fail"
    device: ClassVar[str] = "cpu"
    has_small_operations: ClassVar[bool] = True

    def file(self, matrix: Matrix) -> Path:
        return self.folder / matrix.module

    def make(self, matrix: Matrix) -> None:
        if error := next(self.errors, None):
            raise error
        self.file(matrix).touch()

    def working_bytes(self, matrix: Matrix) -> int:
        return 1

    def settings(self, matrices: object) -> dict[str, object]:
        return {}


@pytest.mark.usefixtures("_two_devices")
def test_the_bytes_are_those_of_one_after_the_other(model: Model, tmp_path: Path) -> None:
    labels = {matrix.module: "nf3-g64-s8" for matrix in model.matrices}
    found = []
    for name, spread in (("cores", over_cores), ("devices", over_gpus)):
        task = QuantizeMatrix(model, labels, None, tmp_path / name)
        task.folder.mkdir()
        assert len(list(spread(task, model.matrices))) == len(model.matrices)
        found.append({path.name: path.read_bytes() for path in task.folder.iterdir()})
    assert len(found[0]) == len(model.matrices)
    assert found[0] == found[1]


@pytest.mark.usefixtures("_two_devices")
def test_a_matrix_that_did_not_fit_beside_others_is_made_alone(model: Model, tmp_path: Path) -> None:
    errors = iter([None, torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError("CUDA out of memory")])
    task = Failing(tmp_path, errors)
    assert len(list(over_gpus(task, model.matrices))) == len(model.matrices)
    assert all(task.file(matrix).exists() for matrix in model.matrices)


@pytest.mark.usefixtures("_two_devices")
@pytest.mark.parametrize(
    "errors", [[torch.OutOfMemoryError("CUDA out of memory")] * 1000, [None, ValueError("a weight is damaged")]]
)
def test_what_fails_alone_too_or_otherwise_ends_it(
    model: Model, tmp_path: Path, errors: list[Exception | None]
) -> None:
    expected = errors[-1]
    assert expected is not None
    with pytest.raises(type(expected), match=str(expected)):
        list(over_gpus(Failing(tmp_path, iter(errors)), model.matrices))


def test_a_name_may_mean_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert [str(each) for each in spread_gpus.gpus_of("cuda")] == ["cuda:0", "cuda:1", "cuda:2"]
    assert spread_gpus.gpus_of("cuda:1") == [torch.device("cuda", 1)]


def test_what_a_gpu_made_is_not_taken_for_what_the_cpu_makes(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = Recipe.of(model=str(tiny_model_dir), **SMALL | {"budget": "4.5bpw"})
    run = Run.open(recipe, Registry(tmp_path), device="cpu", resume=True, log=StageLog(), progress=SILENT)
    settings = [replace(run, device=device)._costs_settings() for device in ("cpu", "cuda", "cuda:1")]
    assert "device" not in settings[0]
    assert settings[1] == settings[2] == settings[0] | {"device": "cuda"}
    assert replace(run, device="cuda")._spread is over_gpus


def test_the_device_reaches_the_work_and_its_key(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = Recipe.of(model=str(tiny_model_dir), **SMALL | {"budget": "4.5bpw"})
    run = Run.open(recipe, Registry(tmp_path), device="cpu", resume=True, log=StageLog(), progress=SILENT)
    statistics = run.statistics()
    plan = run.plan(run.costs(statistics), statistics)
    on_cpu = run.matrices(plan, statistics)
    seen: list[tuple[str, str]] = []

    def spy(task: MatrixTask, matrices: Sequence[Matrix]) -> Iterator[None]:
        seen.append((task.stage, task.device))
        yield from over_cores(replace(task, device="cpu"), matrices)  # type: ignore[type-var]

    on_gpu = replace(run, device="cuda", spread=spy)
    on_gpu.costs(statistics)
    on_gpu.matrices(plan, statistics)
    assert seen == [("costs", "cuda"), ("decompose", "cuda")]
    seen.clear()
    assert run.matrices(plan, statistics) == on_cpu
    assert not seen


def test_one_without_room_leaves_the_work_to_the_others(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, free = torch.device("cpu", 0), torch.device("cpu")
    monkeypatch.setattr(spread_gpus, "gpus_of", lambda device: [full, free])
    monkeypatch.setattr(spread_gpus, "free_bytes", lambda device: 0 if device is full else 2)
    monkeypatch.setattr(spread_gpus, "SLOT_BYTES", 0)
    used: list[torch.device] = []

    class Seen(spread_gpus.Slot):
        def __init__(self, device: torch.device) -> None:
            used.append(device)
            super().__init__(device)

    monkeypatch.setattr(spread_gpus, "Slot", Seen)
    list(over_gpus(Failing(tmp_path, iter([])), model.matrices))
    assert used == [free, free]  # as many as it has room for


@pytest.mark.usefixtures("_two_devices")
def test_a_slot_that_ran_out_of_memory_takes_no_more(model: Model, tmp_path: Path) -> None:
    """All but the last one: what they could not make is made in the end."""
    num_slots = 2 * spread_gpus.STREAMS
    errors: list[Exception | None] = [torch.OutOfMemoryError("CUDA out of memory")] * num_slots
    task = Failing(tmp_path, iter(errors))
    assert len(list(over_gpus(task, model.matrices))) == len(model.matrices)
    assert all(task.file(matrix).exists() for matrix in model.matrices)
