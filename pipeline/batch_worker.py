"""What a worker does with a batch (batch.py): fetch what it reads, make the results, leave them in the store.

$BITSMITH_HOME/workers/worker-*    a process's copies of blobs from a store at a URL; gone after it
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from pipeline.batch import Batch, Blob, PartBatch, to_blob, to_entry
from pipeline.costs import MeasureRow
from pipeline.curvature_sums import sums_of
from pipeline.decompose import QuantizeMatrix
from pipeline.errors import ModelError, WorkerSetupError
from pipeline.home import home
from pipeline.layered import open_network
from pipeline.model import Model, open_model
from pipeline.part_sums import collect_part
from pipeline.statistics import Statistics
from pipeline.summed_parts import layer_file, write_layer
from pipeline.version import VERSION
from registry.lock import flocked
from registry.remote import RemoteBlobs
from registry.store import Store, hash_file

STAGES: dict[str, type[QuantizeMatrix] | type[MeasureRow]] = {each.stage: each for each in (QuantizeMatrix, MeasureRow)}


def make_batch(batch: Batch, say: Callable[[str], None] = lambda text: None) -> dict[str, Blob]:
    """Do it here, with one thread, so that the bytes are the same on any machine of one kind.

    Args:
        say: told before each matrix which it is.
    Returns:
        parameter name -> its result, which is in the store.
    Raises:
        WorkerSetupError: this is another version of the package, or the registry's folder is not on this machine.
        ModelError: the model here is not the one that the run was started with.
        PipelineError, RegistryError: as of the stage.
    """
    _check_version(batch["version"])
    torch.set_num_threads(1)
    model, statistics, store = _opened(
        batch["registry"], batch["store"], _Frozen(batch["model"]), _Frozen(batch["statistics"])
    )
    by_name = {matrix.name: matrix for matrix in model.matrices}
    made: dict[str, Blob] = {}
    with tempfile.TemporaryDirectory(dir=_scratch(), prefix="batch-") as folder:
        task = STAGES[batch["stage"]](model=model, statistics=statistics, folder=Path(folder), **batch["settings"])
        for name in batch["names"]:
            say(f"{batch['stage']}, matrix {name}")
            for file in model.tensors[name].files:
                _check_file(model.path / file, batch["model"]["files"][file])
            task.make(by_name[name])
            made[name] = to_blob(store.add(task.file(by_name[name])))
    return made


def make_part(batch: PartBatch) -> dict[str, Blob]:
    """Collect the sums over a part of the calibration windows.

    Returns:
        name of a layer's file (summed_parts.py) -> the file, which is in the store.
    Raises:
        WorkerSetupError, ModelError: as `make_batch`.
        NonFiniteError: see statistics.py.
    """
    _check_version(batch["version"])
    torch.set_num_threads(batch["num_threads"])
    model, _, store = _opened(batch["registry"], batch["store"], _Frozen(batch["model"]), _Frozen(None))
    for name in {file for info in model.tensors.values() for file in info.files}:
        _check_file(model.path / name, batch["model"]["files"][name])
    sums, network = sums_of(batch["metric"]), open_network(model, batch["device"], lambda text: None)
    made: dict[str, Blob] = {}
    with tempfile.TemporaryDirectory(dir=_scratch(), prefix="part-") as folder:
        tokens = torch.tensor(batch["tokens"], device=batch["device"])

        def keep(layer: int, found: dict[str, torch.Tensor]) -> None:
            path = Path(folder) / layer_file(layer)
            write_layer(path, found, batch["first"] + len(tokens))
            made[path.name] = to_blob(store.add(path))
            path.unlink()

        for _ in collect_part(network, model, tokens, batch["first"], sums, Path(folder), keep, seed=batch["seed"]):
            pass
    return made


def _check_version(version: str) -> None:
    if version != VERSION:
        raise WorkerSetupError(
            f"This worker has bitsmith {VERSION}, and the run was started with {version}. Versions may differ "
            "in the bytes that they make: install the same one on all machines and start the worker again."
        )


class _Frozen(dict):
    """JSON that is compared by its content and may be a key."""

    def __init__(self, content: Mapping[str, Any] | None) -> None:
        super().__init__(content or {})

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(self))


@lru_cache(maxsize=1)  # a process works for one run at a time
def _opened(
    registry: str, url: str | None, model: _Frozen, statistics: _Frozen
) -> tuple[Model, Statistics | None, Store]:
    if url is None and not Path(registry).is_dir():
        raise WorkerSetupError(
            f"The registry {registry} is not on this machine. Workers elsewhere need a store that they can reach: make "
            "the registry with `bitsmith registry init --store URL`, or start the workers on its own machine."
        )
    store = Store(_scratch() if url else Path(registry), RemoteBlobs(url) if url else None)
    spec = str(_from_store(store, model)) if model["is_stored"] else model["spec"]
    if model["revision"] is None:  # else a commit of the Hub's says what it is
        for name, blob in model["files"].items():
            if name.endswith(".py"):
                _check_file(Path(spec) / name, blob)
    opened = open_model(spec, revision=model["revision"], trust_remote_code=model["trust_remote_code"])
    _check_file(opened.path / "config.json", model["files"]["config.json"])
    files = {name: to_entry(blob) for name, blob in statistics.items()}
    learnt = Statistics.open(lambda name: store.path(files[name].sha256)) if files else None
    return opened, learnt, store


def _from_store(store: Store, model: _Frozen) -> Path:
    folder = Path(tempfile.mkdtemp(dir=_scratch(), prefix="model-"))
    for name, blob in model["files"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(store.path(blob["sha256"]), folder / name)
    return folder


@lru_cache(maxsize=4096)
def _sha256(path: Path, size_bytes: int, changed_at: int) -> str:
    return hash_file(path).sha256


def _check_file(path: Path, blob: Blob) -> None:
    try:
        status = path.stat()
        found = _sha256(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ModelError(f"{path} cannot be read on this machine: {error}. Start the run again.") from error
    if found != blob["sha256"]:
        raise ModelError(
            f"{path} is not what it was when the run was started: its sha256 is {found}, not {blob['sha256']}. It "
            "changed since, or differs on this machine. Start the run again, and leave the model alone while it lasts."
        )


@cache
def _scratch() -> Path:
    """A folder of this process; what dead ones left is removed."""
    workers = home() / "workers"
    workers.mkdir(parents=True, exist_ok=True)
    with flocked(workers / "lock", exclusively=True):
        for path in workers.glob("worker-*"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except BlockingIOError:
                pass
            finally:
                os.close(descriptor)
        folder = Path(tempfile.mkdtemp(dir=workers, prefix="worker-"))
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)  # until the process ends
    return folder
