"""The noun of the whole pipeline: a language model in a folder of safetensors, opened lazily.

model = open_model("demo")             # headers only: seconds and no memory for a model of any size
for matrix in model.matrices: ...      # what can be compressed; model.skipped says why the rest cannot
weight = model.weight(matrix)          # float32 [out, in], read from its shard now
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer

from pipeline.completeness import check_complete, check_shapes
from pipeline.errors import ModelError, NonFiniteError
from pipeline.experts import PiecedTensor, expert_tensors
from pipeline.extra_files import check_extra_files, extra_files
from pipeline.model_config import read_config, refuse_quantized
from pipeline.own_code import TRUST_ADVICE, code_files, forget_code, names_code, refuse_code_elsewhere
from pipeline.progress import SILENT, Progress
from pipeline.quiet import first_line, quiet_transformers
from pipeline.safetensors_file import DTYPES
from pipeline.shards import FLOAT_DTYPES, TensorInfo, read_folder
from pipeline.sources import find_source
from pipeline.stored_names import StoredNames, match_names
from pipeline.structure import Embedding, Structure, build_skeleton, read_structure
from pipeline.task import Task, auto_class, settle_architecture, task_of
from quantizers.experts import set_experts_apart

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Embedding", "Matrix", "Model", "Skipped", "TensorInfo", "open_model"]

UNUSED = "not used by the architecture"  # the reason of a tensor that is copied, and that transformers leaves out
LARGEST_WEIGHT = 1e18  # in magnitude: errors are summed as squares in float32


@dataclass(frozen=True)
class Matrix:
    """A weight that can be compressed: a linear layer's, inside the repeated blocks.

    Attributes:
        name: the parameter, `model.layers.0.self_attn.q_proj.weight`.
        module: its layer, `model.layers.0.self_attn.q_proj`.
        shape: (out, in), whatever the storage order.
        transposed: stored as [in, out], as transformers' `Conv1D` does.
        dtype: as stored, in safetensors' spelling: `BF16`.
        layer: index of its block.
        kind: last component of the module name, `q_proj`.
        group: matrices of one group read the same input tensor.
    """

    name: str
    module: str
    shape: tuple[int, int]
    transposed: bool
    dtype: str
    layer: int
    kind: str
    group: str

    @property
    def num_params(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Skipped:
    """A weight that stays as it is, and why. A tied one that is not stored itself has `size_bytes` 0."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    reason: str


@dataclass(frozen=True, eq=False)
class Model:
    """An opened model; see `open_model`.

    Attributes:
        spec: what the user typed.
        path: the folder with the safetensors.
        revision: the commit on the Hub; None for local files.
        config: as transformers reads it.
        tensors: parameter name -> where and how it is stored. Tensors that become no parameter unchanged
            (experts that are merged on loading, left-over buffers) stand under their stored name.
        matrices: by layer, then in module order.
        embeddings: of the input and of the output, where they can be packed; they stand in `skipped` too.
        skipped: everything that is no matrix.
        ties: parameter name -> the parameter whose tensor it shares.
        num_positions: the longest text that it can read, in tokens; None where positions are computed.
        experts_apart: each expert of a mixture is layers of its own, in whatever network is made of the model.
        trust_remote_code: code comes with it, which is run and belongs to what it is.
    """

    spec: str
    path: Path
    revision: str | None
    config: "PretrainedConfig" = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    matrices: tuple[Matrix, ...] = field(repr=False)
    embeddings: tuple[Embedding, ...] = field(repr=False)
    skipped: tuple[Skipped, ...] = field(repr=False)
    ties: dict[str, str] = field(repr=False)
    num_positions: int | None = field(repr=False)
    experts_apart: bool = field(default=False, repr=False)
    trust_remote_code: bool = field(default=False, repr=False)

    @cached_property
    def task(self) -> Task:
        """What it is asked, and what of its answer counts."""
        return task_of(self.config)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """File -> sha256, of config and weight files, and of code that is run.

        Reads every byte once (a second per GB or so), hence not part of opening.
        """
        names = {"config.json"} | {file for info in self.tensors.values() for file in info.files}
        if self.trust_remote_code:
            names.update(code_files(self.path))
        return {name: _file_sha256(self.path / name) for name in sorted(names)}

    @cached_property
    def digest(self) -> str:
        """sha256 of what the model is: of the canonical JSON of `hashes`."""
        return hashlib.sha256(json.dumps(self.hashes, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def num_params(self) -> int:
        """Elements of all stored tensors; a tied weight counts once."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @property
    def num_matrix_params(self) -> int:
        return sum(matrix.num_params for matrix in self.matrices)

    @property
    def size_bytes(self) -> int:
        """Bytes of all stored tensors, file headers excluded."""
        return sum(info.size_bytes for info in self.tensors.values())

    @property
    def folder_bytes(self) -> int:
        """What a finished folder is compared with: tensors, config.json, and `extra_files`."""
        return self.size_bytes + sum((self.path / name).stat().st_size for name in (*self.extra_files(), "config.json"))

    def check_finite(self, progress: Progress = SILENT) -> None:
        """Read every stored tensor once.

        Raises:
            NonFiniteError: one holds a NaN, an infinity or a number beyond LARGEST_WEIGHT; names it.
        """
        for name in progress.track(self.tensors, "Check the weights", total=len(self.tensors)):
            self._check_finite(name, self.tensor(name))

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if not tensor.is_floating_point() or not tensor.numel():
            return
        num_bad, bad = tensor.numel() - int(torch.isfinite(tensor).sum()), "NaN or infinite values"
        if not num_bad:
            smallest, largest = tensor.aminmax()
            if max(-float(smallest), float(largest)) <= LARGEST_WEIGHT:
                return
            num_bad = int((tensor.abs().double() > LARGEST_WEIGHT).sum())
            bad = f"values beyond {LARGEST_WEIGHT:.0e}, whose squares float32 cannot hold,"
        raise NonFiniteError(
            f"{name} in {self.path} has {num_bad} {bad} of {tensor.numel()}; every weight must be finite. The "
            "checkpoint is damaged or its training diverged: download it again, or take another one."
        )

    def groups(self) -> dict[str, list[Matrix]]:
        """Group name -> its matrices, both in the order of `matrices`."""
        members: dict[str, list[Matrix]] = defaultdict(list)
        for matrix in self.matrices:
            members[matrix.group].append(matrix)
        return dict(members)

    def tensor(self, name: str) -> Tensor:
        """The tensor of `tensors[name]` as stored: its own dtype and order, on the CPU.

        Raises:
            KeyError: no such tensor.
            ModelError: its shard cannot be read any more.
        """
        info = self.tensors[name]
        try:
            return info.read(self.path)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"Cannot read {info.name} from {self.path / info.file}: {error}. The file has changed since "
                "it was opened, or the disk is failing: check it, and download the model again."
            ) from error

    def weight(self, matrix: Matrix) -> Tensor:
        """float32 [out, in] on the CPU, read now.

        Raises:
            NonFiniteError: as `check_finite`.
        """
        stored = self.tensor(matrix.name)
        weight = stored.T if matrix.transposed else stored
        self._check_finite(matrix.name, weight)
        return weight.to(torch.float32).contiguous()

    def load(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
        """The whole model in memory, in eval mode."""
        with quiet_transformers():
            model = auto_class(self.config).from_pretrained(
                self.path,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=self.trust_remote_code,
            )
        if not self.trust_remote_code:
            forget_code(model.config)
        if self.experts_apart:
            set_experts_apart(model)
        model.to(torch.device(device))  # type: ignore[arg-type]
        return model.eval()

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's own tokenizer, with its chat template where it has one.

        Raises:
            ModelError: there is none in the folder.
        """
        try:
            with quiet_transformers():
                return AutoTokenizer.from_pretrained(
                    self.path, local_files_only=True, trust_remote_code=self.trust_remote_code
                )
        except Exception as error:  # its own code may raise anything
            known = OSError | ValueError | KeyError | TypeError | ImportError
            if not isinstance(error, known) and not self.trust_remote_code:
                raise
            is_refused = names_code(self.path) and not self.trust_remote_code
            advice = TRUST_ADVICE if is_refused else "Save the model's tokenizer into that folder."
            raise ModelError(
                f"No usable tokenizer in {self.path}: {first_line(error)} Expected tokenizer.json or "
                f"another tokenizer that transformers reads. {advice}"
            ) from error

    def extra_files(self) -> list[str]:
        """Names of what a complete folder has beside config, weights and README: tokenizer, licence ...

        Code of its own is among them where it is on this disk alone.
        """
        return extra_files(self.path, with_code=self.trust_remote_code and not self.revision)


def open_model(
    spec: str, *, revision: str | None = None, trust_remote_code: bool = False, progress: Progress = SILENT
) -> Model:
    """Open a model from its headers, and check that it is whole.

    Args:
        spec: a folder, a Hub id, a GGUF file (converted once), or `demo`.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run the code that comes with it; see pipeline/own_code.py.
        progress: told about downloads and conversions.
    Raises:
        ModelError: unknown, unsafe, incomplete, damaged, already quantized, or without a compressible matrix.
    """
    source = find_source(spec, revision, progress, trust_remote_code=trust_remote_code)
    is_trusted = trust_remote_code and names_code(source.path)
    if is_trusted:
        refuse_code_elsewhere(source.path)
    config = read_config(source.path, trust_remote_code=is_trusted)
    stored = read_folder(source.path)
    settle_architecture(config, [info.name for info in stored])
    skeleton = build_skeleton(config)
    names = match_names(skeleton, [info.name for info in stored])
    refuse_quantized(source.path, [info for info in stored if not names.knows(info.name)])
    experts = expert_tensors(skeleton, names, {info.name: info for info in stored})
    if experts:
        set_experts_apart(skeleton)
    structure = read_structure(skeleton)
    tensors = _tensors(stored, names, experts or {})
    check_complete(source.path, structure, names, skeleton, set(tensors))
    check_shapes(source.path, structure, tensors)
    matrices = _matrices(structure, tensors)
    if not matrices:
        raise ModelError(
            f"{spec} ({type(skeleton).__name__}) has no compressible matrix: no linear layer inside repeated "
            "blocks that is stored as one 2-D tensor. Choose a transformer that reads text."
        )
    _check_dtypes(tensors)
    check_extra_files(source.path, extra_files(source.path, with_code=is_trusted))
    return Model(
        spec=spec,
        path=source.path,
        revision=source.revision,
        config=config,
        tensors=tensors,
        matrices=matrices,
        embeddings=_embeddings(structure, tensors),
        skipped=_skipped(structure, names, tensors, {matrix.name for matrix in matrices}),
        ties=structure.ties,
        num_positions=structure.num_positions,
        experts_apart=bool(experts),
        trust_remote_code=is_trusted,
    )


def _tensors(
    stored: Iterable[TensorInfo], names: StoredNames, experts: dict[str, PiecedTensor]
) -> dict[str, TensorInfo]:
    in_pieces = {piece.info.name for tensor in experts.values() for piece in tensor.pieces}
    plain = {names.parameters.get(info.name, info.name): info for info in stored if info.name not in in_pieces}
    return plain | experts


def _check_dtypes(tensors: dict[str, TensorInfo]) -> None:
    """Raise ModelError if a tensor cannot be copied into a checkpoint."""
    for info in tensors.values():
        if info.dtype not in DTYPES:
            raise ModelError(
                f"{info.name} in {info.file} is stored as {info.dtype}, and only {', '.join(DTYPES)} can be copied "
                "into a checkpoint. Convert it, or open a version of the model without it."
            )


def _is_float(info: TensorInfo | None) -> bool:
    return info is not None and info.dtype in FLOAT_DTYPES


def _matrices(structure: Structure, tensors: dict[str, TensorInfo]) -> tuple[Matrix, ...]:
    matrices = []
    for site in structure.sites:
        info = tensors.get(site.name)
        if info is None:
            continue
        if not _is_float(info):
            raise ModelError(
                f"{info.name} in {info.file} is stored as {info.dtype}, not as {', '.join(FLOAT_DTYPES)}. "
                "These weights look quantized already: open the original model instead."
            )
        kind = site.module.rpartition(".")[2]
        matrices.append(
            Matrix(
                name=site.name,
                module=site.module,
                shape=site.shape,
                transposed=site.transposed,
                dtype=info.dtype,
                layer=site.layer,
                kind=kind,
                group=site.group,
            )
        )
    return tuple(matrices)


def _embeddings(structure: Structure, tensors: dict[str, TensorInfo]) -> tuple[Embedding, ...]:
    """Those that are stored as one tensor, which all that share it according to the architecture do share."""
    stored_twice = {source for target, source in structure.ties.items() if target in tensors}
    return tuple(
        each for each in structure.embeddings if _is_float(tensors.get(each.name)) and each.name not in stored_twice
    )


def _skipped(
    structure: Structure, names: StoredNames, tensors: dict[str, TensorInfo], matrices: set[str]
) -> tuple[Skipped, ...]:
    stored = []
    for name, info in tensors.items():
        if name in matrices:
            continue
        merged = names.merged.get(info.name)
        target = merged.target if merged and merged.target in structure.shapes else None
        reason = f"merged into {target} on loading: not supported yet" if target else structure.reasons.get(name)
        stored.append(Skipped(name, info.shape, info.dtype, info.size_bytes, reason or UNUSED))
    tied = [
        Skipped(name, structure.shapes[name], tensors[source].dtype, 0, structure.reasons[name])
        for name, source in structure.ties.items()
        if name in structure.shapes and name not in tensors and source in tensors
    ]
    return tuple(stored + tied)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
