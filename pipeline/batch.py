"""A batch: what a stage does to some matrices, as plain JSON that any machine with this package can do.

See batch_worker.py for the doing. What it reads and what it leaves are blobs, named by their hashes. They lie in the
registry's folder, which every process of one machine sees, or in the store at a URL that the registry names
(registry/remote.py): then that URL is all that machines share. A model from the Hub comes from there by its commit; one
in a folder is a set of blobs like the rest.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from pipeline.atomic import replace_file
from pipeline.curvature_sums import Metric
from pipeline.model import Matrix, Model
from pipeline.shards import INDEX_FILE
from pipeline.spread import MatrixTask
from pipeline.version import VERSION
from registry import Artifact, FileEntry, IntegrityError, Registry
from registry.store import hash_file

PARAMS_A_BATCH = 2**22  # some seconds of a core, against some tens of milliseconds that handing out a batch takes


class Blob(TypedDict):
    """registry.FileEntry as JSON."""

    sha256: str
    size_bytes: int


class BatchModel(TypedDict):
    """The model: `files` are the blobs of config and weights, all of them in the store where `is_stored`."""

    spec: str
    revision: str | None
    files: dict[str, Blob]
    is_stored: bool
    trust_remote_code: bool


class Place(TypedDict):
    """Where a worker finds what it reads, and leaves what it makes; `version` is the package's."""

    version: str
    registry: str
    store: str | None
    model: BatchModel


class Batch(Place):
    """See the module's docstring.

    `stage` is a key of batch_worker.STAGES, `settings` what its MatrixTask gives for the matrices `names` (of
    parameters); `statistics` are the blobs of the statistics by file name, None for an unweighted error.
    """

    statistics: dict[str, Blob] | None
    stage: str
    names: list[str]
    settings: dict[str, Any]


def batches_of(
    task: MatrixTask, matrices: Sequence[Matrix], model: Model, statistics: Artifact | None, registry: Registry
) -> list[Batch]:
    """The work of `task` on these matrices, in batches of about `PARAMS_A_BATCH` parameters, or of one larger matrix.

    The largest first, so that nobody waits long for the last one.

    Raises:
        RegistryError: a model in a folder cannot be sent to the registry's remote store.
    """
    place = _place(model, registry)
    learnt = {path: to_blob(entry) for path, entry in statistics.files.items()} if statistics else None
    return [
        Batch(
            **place,
            statistics=learnt,
            stage=task.stage,
            names=[matrix.name for matrix in members],
            settings=task.settings(members),
        )
        for members in sorted(_chunks(matrices), key=_num_params, reverse=True)
    ]


class PartBatch(Place):
    """A part of the calibration windows, for statistics; `first` is the number of its first window.

    `tokens` are lists of token ids, a window each. All machines use `num_threads`, on which the bytes depend.
    """

    tokens: list[list[int]]
    first: int
    metric: Metric
    seed: int
    device: str
    num_threads: int


def part_batches(
    used: Tensor, parts: Sequence[range], model: Model, registry: Registry, *, metric: Metric, seed: int, device: str
) -> list[PartBatch]:
    """The statistics' work on these parts of the windows `used` [windows, seq_len].

    Raises:
        RegistryError: as `batches_of`.
    """
    place = _place(model, registry)
    return [
        PartBatch(
            **place,
            tokens=used[part.start : part.stop].tolist(),
            first=part.start,
            metric=metric,
            seed=seed,
            device=device,
            num_threads=torch.get_num_threads(),
        )
        for part in parts
    ]


def take_result(registry: Registry, blob: Blob, target: Path) -> None:
    """Copy a result of batch_worker.make_batch to `target`, there whole or not at all.

    Raises:
        NotFoundError, IntegrityError: it is lost or damaged.
    """
    source = registry.store.path(blob["sha256"])

    def copy(path: Path) -> None:
        shutil.copyfile(source, path)
        if (found := hash_file(path)) != to_entry(blob):
            raise IntegrityError(str(source), blob["sha256"], found.sha256, "Run the command again.")

    replace_file(target, copy)


def _chunks(matrices: Sequence[Matrix]) -> Iterator[list[Matrix]]:
    members: list[Matrix] = []
    for matrix in matrices:
        members.append(matrix)
        if _num_params(members) >= PARAMS_A_BATCH:
            yield members
            members = []
    if members:
        yield members


def _num_params(matrices: Sequence[Matrix]) -> int:
    return sum(each.num_params for each in matrices)


def _place(model: Model, registry: Registry) -> Place:
    remote = registry.store.remote
    return Place(
        version=VERSION,
        registry=str(registry.root.absolute()),
        store=remote.url if remote else None,
        model=_model(model, registry),
    )


def _model(model: Model, registry: Registry) -> BatchModel:
    is_elsewhere = registry.store.remote is not None
    is_stored = is_elsewhere and model.revision is None
    from_hub = is_elsewhere and model.revision is not None
    entries = {name: FileEntry(sha256, (model.path / name).stat().st_size) for name, sha256 in model.hashes.items()}
    if (model.path / INDEX_FILE).exists():
        entries[INDEX_FILE] = hash_file(model.path / INDEX_FILE)
    if is_stored and not all(registry.store.has(entry) for entry in entries.values()):
        with registry.adding():
            for name in entries:
                registry.store.add(model.path / name)
            registry.record(Artifact.create("model", entries))
    return BatchModel(
        spec=model.spec if from_hub else str(model.path.absolute()),
        revision=model.revision if from_hub else None,
        files={name: to_blob(entry) for name, entry in entries.items()},
        is_stored=is_stored,
        trust_remote_code=model.trust_remote_code,
    )


def to_blob(entry: FileEntry) -> Blob:
    """As JSON."""
    return Blob(sha256=entry.sha256, size_bytes=entry.size_bytes)


def to_entry(blob: Blob) -> FileEntry:
    """Undo `to_blob`."""
    return FileEntry(blob["sha256"], blob["size_bytes"])
