"""Where the weights of single experts are stored: as tensors of their own, or as slices of a 3-D one.

model.layers.0.mlp.experts.3.gate_up.weight   [2 * inner, width]    (quantizers/experts.py)
    is  ...block_sparse_moe.experts.3.w1.weight above ...w3.weight  in Mixtral's files,
    and the fourth slice of ...mlp.experts.gate_up_proj             where a file has experts fused
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.shards import FLOAT_DTYPES, TensorInfo
from pipeline.stored_names import StoredNames
from quantizers.experts import LAYER_NAMES, fused_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERT_NUMBER = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Piece:
    """A stored tensor, or slice `index` of it, perhaps transposed."""

    info: TensorInfo
    index: int | None = None
    is_transposed: bool = False

    def read(self, folder: Path) -> Tensor:
        """As stored, on the CPU."""
        with safe_open(folder / self.info.file, framework="pt") as shard:
            if self.index is None:
                return shard.get_tensor(self.info.name)
            part = shard.get_slice(self.info.name)[self.index]
        return part.T if self.is_transposed else part

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is read."""
        shape = self.info.shape if self.index is None else self.info.shape[1:]
        return shape[::-1] if self.is_transposed else shape


@dataclass(frozen=True)
class PiecedTensor(TensorInfo):
    """A parameter made of stored tensors, one above the other; `file` is that of the first."""

    pieces: tuple[Piece, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """See TensorInfo."""
        return tuple(dict.fromkeys(piece.info.file for piece in self.pieces))

    def read(self, folder: Path) -> Tensor:
        """See TensorInfo."""
        parts = [piece.read(folder) for piece in self.pieces]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def expert_tensors(
    skeleton: "PreTrainedModel", names: StoredNames, stored: Mapping[str, TensorInfo]
) -> dict[str, PiecedTensor] | None:
    """Parameter name -> how it is stored, for all experts of the model once they are set apart.

    Args:
        skeleton: with its experts fused.
        stored: by stored names.
    Returns:
        None where some experts are merged in a way that is not known here; they all stay fused then.
    Raises:
        ModelError: an expert more than the model has, or pieces of one that are missing or unlike the others'.
    """
    merged: dict[str, dict[int, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for name, entry in names.merged.items():
        number = EXPERT_NUMBER.search(name)
        if number and entry.is_stacked:
            merged[entry.target][int(number[1])][entry.place] = name
    found: dict[str, PiecedTensor] = {}
    stored_as = {parameter: name for name, parameter in names.parameters.items()}
    for module_name, module in fused_experts(skeleton).items():
        for fused_name, layer, is_weight in _parameters(module):
            fused = f"{module_name}.{fused_name}"
            leaf = "weight" if is_weight else "bias"
            is_transposed = is_weight and getattr(module, "is_transposed", False)
            pieces: dict[int, tuple[Piece, ...]]
            if fused in stored_as:
                info = stored[stored_as[fused]]
                pieces = {index: (Piece(info, index, is_transposed),) for index in range(info.shape[0])}
            elif fused in merged and not is_transposed:
                num_experts = module.get_parameter(fused_name).shape[0]
                pieces = _pieces_of_experts(merged[fused], stored, num_experts)
            else:
                return None
            for index, parts in pieces.items():
                name = f"{module_name}.{index}.{layer}.{leaf}"
                found[name] = _pieced(name, parts)
    return found


def _pieces_of_experts(
    names: Mapping[int, Mapping[int, str]], stored: Mapping[str, TensorInfo], num_experts: int
) -> dict[int, tuple[Piece, ...]]:
    """Of each expert: what lies one above the other in its weight. `names`: expert -> place -> stored name."""
    whole = {place: name for by_place in reversed(list(names.values())) for place, name in by_place.items()}
    for index, by_place in names.items():
        for place, name in by_place.items():
            info, like = stored[name], stored[whole[place]]
            if index >= num_experts:
                raise ModelError(
                    f"{name} in {info.file} is of an expert that config.json does not know: there are {num_experts}, "
                    "counted from 0. The config and the weights do not belong together: download both again."
                )
            if (info.shape, info.dtype) != (like.shape, like.dtype):
                raise ModelError(
                    f"{name} in {info.file} is {info.dtype} {list(info.shape)}, where {like.name} is {like.dtype} "
                    f"{list(like.shape)}, and experts are alike. The file is damaged: download it again."
                )
            if info.dtype not in FLOAT_DTYPES:
                raise ModelError(
                    f"{name} in {info.file} is stored as {info.dtype}, not as {', '.join(FLOAT_DTYPES)}. "
                    "These weights look quantized already: open the original model instead."
                )
        if missing := whole.keys() - by_place.keys():
            there = whole[min(missing)]
            lacked = EXPERT_NUMBER.sub(f".experts.{index}.", there)
            raise ModelError(
                f"The weights lack {lacked}, and have {there}. Download the model again; files that are there are kept."
            )
    return {index: tuple(Piece(stored[name]) for _, name in sorted(found.items())) for index, found in names.items()}


def _parameters(module: nn.Module) -> Iterator[tuple[str, str, bool]]:
    """Name of a fused parameter, of the layer that an expert has of it, and whether it is a weight."""
    for name, _ in module.named_parameters(recurse=False):
        weight = name.removesuffix("_bias")
        if weight in LAYER_NAMES:
            yield name, LAYER_NAMES[weight], weight == name


def _pieced(name: str, pieces: tuple[Piece, ...]) -> PiecedTensor:
    rows = sum(piece.shape[0] for piece in pieces)
    shape = (rows, *pieces[0].shape[1:])
    size_bytes = sum(
        piece.info.size_bytes if piece.index is None else piece.info.size_bytes // piece.info.shape[0]
        for piece in pieces
    )
    return PiecedTensor(name, pieces[0].info.file, pieces[0].info.dtype, shape, size_bytes, pieces)
