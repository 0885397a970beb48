"""Batches: what a worker elsewhere makes is what would have been made here, and what it must refuse."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import batch as batches
from pipeline.batch import Batch, batches_of, part_batches, take_result
from pipeline.calibration import TokenWindows
from pipeline.costs import MeasureRow
from pipeline.curvature_sums import Metric
from pipeline.decompose import QuantizeMatrix
from pipeline.errors import ModelError, WorkerSetupError
from pipeline.home import home
from pipeline.model import Model, open_model
from pipeline.statistics import SpreadParts, Statistics, collect_statistics
from pipeline.summed_parts import layer_file
from registry import Artifact, IntegrityError, Registry
from tests.registry.at_url import registry_at

CHOICES = ["nf3-g64-s8", "lloyd2-g32-s4-r4-f8"]


@pytest.fixture(params=["folder", "url"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    """With its blobs in its folder, and at a URL."""
    if request.param == "url":
        return registry_at((tmp_path / "store").as_uri(), tmp_path / "registry")
    return Registry(tmp_path / "registry")


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """In several shards, the test's own."""
    from tests.models import build_llama, save_model

    return open_model(str(save_model(build_llama(), tmp_path / "model", max_shard_size="100KB")))


@pytest.fixture
def statistics(model: Model, registry: Registry, tmp_path: Path) -> Artifact:
    tokens = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    work = tmp_path / "work"
    work.mkdir()
    windows = TokenWindows(tokens, "0" * 64, "made up", None, 1)
    collect_statistics(model, windows, "fisher", work, seed=0, device="cpu")
    return registry.add_artifact("statistics", work / "out")


def _tasks(model: Model, learnt: Statistics, folder: Path) -> list[QuantizeMatrix | MeasureRow]:
    folder.mkdir(parents=True, exist_ok=True)
    labels = {matrix.module: CHOICES[number % 2] for number, matrix in enumerate(model.matrices)}
    choices = {matrix.name: CHOICES for matrix in model.matrices}
    return [QuantizeMatrix(model, labels, learnt, folder), MeasureRow(model, choices, 16, 0, learnt, folder)]


def _elsewhere(made: list[Batch], monkeypatch: pytest.MonkeyPatch, home: Path) -> list[Batch]:
    """As another machine with a home of its own would read them, if all it shares is a store's URL."""
    from pipeline import batch_worker

    monkeypatch.setenv("BITSMITH_HOME", str(home))
    batch_worker._opened.cache_clear()
    batch_worker._scratch.cache_clear()
    sent = json.loads(json.dumps(made))
    for each in sent:
        if each["store"]:
            each["registry"] = "/not/on/this/machine"
    return sent


@pytest.mark.parametrize("number", [0, 1], ids=["decompose", "costs"])
def test_a_worker_makes_what_would_be_made_here(
    model: Model,
    statistics: Artifact,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    from pipeline.batch_worker import make_batch

    monkeypatch.setattr(batches, "PARAMS_A_BATCH", 3 * 64 * 64)
    learnt = Statistics.open(lambda name: registry.path(statistics, name))
    here = _tasks(model, learnt, tmp_path / "here")[number]
    there = _tasks(model, learnt, tmp_path / "there")[number]
    made = batches_of(there, model.matrices, model, statistics, registry)
    assert len(made) > 2
    assert [name for each in made for name in each["names"]] == [matrix.name for matrix in model.matrices]
    for matrix in model.matrices:
        here.make(matrix)
    if made[0]["store"]:
        shutil.rmtree(model.path)  # workers elsewhere see only what they are sent
    said: list[str] = []
    by_name = {matrix.name: matrix for matrix in model.matrices}
    for each in _elsewhere(made, monkeypatch, tmp_path / "worker"):
        for name, blob in make_batch(each, said.append).items():
            take_result(registry, blob, there.file(by_name[name]))
    assert said == [f"{there.stage}, matrix {matrix.name}" for matrix in model.matrices]
    for matrix in model.matrices:
        assert there.file(matrix).read_bytes() == here.file(matrix).read_bytes()


def test_the_largest_batches_come_first(
    model: Model, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "PARAMS_A_BATCH", 1)
    task, _ = _tasks(model, None, tmp_path / "made")
    sizes = {matrix.name: matrix.num_params for matrix in model.matrices}
    names = [name for each in batches_of(task, model.matrices, model, None, registry) for name in each["names"]]
    assert [sizes[name] for name in names] == sorted(sizes.values(), reverse=True)
    assert sorted(names) == sorted(sizes)
    assert names != list(sizes)


@pytest.mark.parametrize("metric", ["fisher", "kronecker"])
def test_parts_collected_elsewhere_give_the_statistics_that_are_collected_here(
    model: Model, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: Metric
) -> None:
    """A run that had the first part, and was killed while the second was added, has the others made elsewhere."""
    from pipeline import summed_parts
    from pipeline.batch_worker import make_part

    tokens = torch.randint(0, 100, (9, 16), generator=torch.Generator().manual_seed(0))
    windows = TokenWindows(tokens, "0" * 64, "made up", None, 1)
    monkeypatch.setattr(summed_parts, "PART_WINDOWS", 3)

    def collected(name: str, spread: SpreadParts | None = None) -> dict[str, bytes]:
        work = tmp_path / name
        work.mkdir(exist_ok=True)
        collect_statistics(model, windows, metric, work, seed=7, device="cpu", spread=spread)
        return {path.name: path.read_bytes() for path in (work / "out").iterdir()}

    here = collected("here")

    def elsewhere(used: torch.Tensor, parts: Sequence[range]) -> Iterator[Callable[[int], dict[str, torch.Tensor]]]:
        batches = part_batches(used, parts, model, registry, metric=metric, seed=7, device="cpu")
        for batch in json.loads(json.dumps(batches)):
            made = make_part(batch)
            yield lambda layer, made=made: load_file(registry.store.path(made[layer_file(layer)]["sha256"]))

    def until_the_second_layer_of_the_second_part(used: torch.Tensor, parts: Sequence[range]):
        first, second, *_ = elsewhere(used, parts)
        yield first

        def killed(layer: int) -> dict[str, torch.Tensor]:
            if layer == 1:
                raise KeyboardInterrupt
            return second(layer)

        yield killed

    with pytest.raises(KeyboardInterrupt):
        collected("there", until_the_second_layer_of_the_second_part)
    assert collected("there", elsewhere) == here


@pytest.fixture
def sent(
    model: Model, statistics: Artifact, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Batch:
    """One batch with all matrices, about to be made."""
    learnt = Statistics.open(lambda name: registry.path(statistics, name))
    task = _tasks(model, learnt, tmp_path / "there")[0]
    return _elsewhere(batches_of(task, model.matrices, model, statistics, registry), monkeypatch, tmp_path / "worker")[
        0
    ]


def _refused(sent: Batch, error: type[Exception], match: str) -> None:
    from pipeline.batch_worker import make_batch

    with pytest.raises(error, match=match):
        make_batch(sent)


def test_another_version_of_the_package_is_refused(sent: Batch) -> None:
    _refused({**sent, "version": "0.0.1"}, WorkerSetupError, "the run was started with 0.0.1.*install the same one")


def test_without_a_store_the_registry_must_be_on_the_worker_s_machine(sent: Batch) -> None:
    _refused({**sent, "store": None, "registry": "/not/here"}, WorkerSetupError, "registry init --store URL")


def test_a_model_that_changed_since_the_start_is_refused(model: Model, sent: Batch) -> None:
    if sent["model"]["is_stored"]:
        pytest.skip("such a worker reads the model from the store, by its hashes")
    shard = model.path / model.tensors[model.matrices[0].name].file
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    _refused(sent, ModelError, "is not what it was when the run was started")


def test_a_result_that_is_damaged_on_its_way_is_not_taken(sent: Batch, registry: Registry, tmp_path: Path) -> None:
    from pipeline.batch_worker import make_batch

    blob = next(iter(make_batch(sent).values()))
    path = registry.store.path(blob["sha256"])
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    target = tmp_path / "target"
    with pytest.raises(IntegrityError, match="is damaged"):
        take_result(registry, blob, target)
    assert not target.exists()
    assert list(tmp_path.glob(".target*")) == []


def test_copies_of_dead_workers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import batch_worker

    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path))
    dead = home() / "workers" / "worker-dead"
    dead.mkdir(parents=True)
    (dead / "blob").write_bytes(b"1")
    batch_worker._scratch.cache_clear()
    mine = batch_worker._scratch()
    batch_worker._scratch.cache_clear()
    assert not dead.exists()
    assert batch_worker._scratch() != mine
    assert mine.exists(), "its process is alive"
