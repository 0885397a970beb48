"""A dense bfloat16 model of a checkpoint with its adapter inside: W = Q + L1 L2 + B A, for programs that read no codes.

The folder is an ordinary one of transformers, as large as the original; what made it stands in merged.json.
"""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.adapter import load_tuned
from pipeline.atomic import write_json
from pipeline.disk_space import disk_may_fill_up
from pipeline.errors import CheckpointError, OutputExistsError
from pipeline.extra_files import extra_files
from pipeline.packed import load_tokenizer
from pipeline.quiet import quiet_transformers
from pipeline.task import auto_class
from quantizers import QuantizedLinear
from quantizers.adapter import BINDING_FILE, LoraQuantizedLinear
from quantizers.embedding import PackedRows, TiedEmbedding, TiedHead

NOTE_FILE = "merged.json"
PACKED_EMBEDDINGS = (PackedRows, TiedEmbedding, TiedHead)


def check_merged_folder(folder: Path, adapter: Path) -> None:
    """Raise OutputExistsError unless the merged model of `adapter` is there, is on its way, or can come there."""
    partial = _partial(folder)
    for place in (folder, partial):
        is_free = not place.exists() or (place.is_dir() and not any(place.iterdir()))
        if not is_free and not _is_merged_from(place, adapter):
            raise OutputExistsError(
                f"{place} is there already, and a merged model needs a new folder. Name another one, or move it away."
            )


def write_merged(checkpoint: Path, adapter: Path, folder: Path) -> bool:
    """Write it, whole or not at all; False where it was there.

    Takes the memory of the packed model and of the dense one in bfloat16.

    Raises:
        CheckpointError: see `load_tuned`; or the architecture fuses what is packed apart (mixtures of experts).
        DiskSpaceError: the disk is full.
        OutputExistsError: `folder` holds something else.
    """
    check_merged_folder(folder, adapter)
    if _is_merged_from(folder, adapter):
        return False
    tuned = load_tuned(checkpoint, adapter)
    network = cast(PreTrainedModel, tuned.get_base_model())
    dense = _empty(network)
    layers = _layers(network)
    embeddings = {name: module for name, module in network.named_modules() if isinstance(module, PACKED_EMBEDDINGS)}
    inside = tuple(f"{name}." for name in (*layers, *embeddings))
    state = {name: _stored(tensor) for name, tensor in network.state_dict().items() if not name.startswith(inside)}
    for name, layer in layers.items():
        state |= {f"{name}.{key}": _stored(tensor) for key, tensor in _dense_tensors(name, layer, dense).items()}
    for name, each in embeddings.items():
        state[f"{name}.weight"] = _stored(each.weight)
        if (bias := getattr(each, "bias", None)) is not None:
            state[f"{name}.bias"] = _stored(bias)
    missing = dense.state_dict().keys() - state.keys()
    if missing:
        raise CheckpointError(
            f"{type(dense).__name__} has the weight {min(missing)} in one piece, which the checkpoint packs apart: "
            "merging is not there for mixtures of experts. Use the adapter on the packed checkpoint."
        )
    dense.load_state_dict(state, assign=True, strict=False)
    dense.tie_weights()
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    with disk_may_fill_up(folder.parent, size_bytes), quiet_transformers():
        partial = _partial(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_json(partial / NOTE_FILE, _note(adapter))
        dense.save_pretrained(partial)
        load_tokenizer(checkpoint).save_pretrained(partial)
        for name in extra_files(checkpoint, with_code=False):
            if not (partial / name).exists():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint / name, partial / name)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    return True


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.merging")


def _note(adapter: Path) -> dict[str, Any]:
    """What a merged folder is told by."""
    return {"adapter": adapter.resolve().name} | json.loads((adapter / BINDING_FILE).read_text(encoding="utf-8"))


def _is_merged_from(folder: Path, adapter: Path) -> bool:
    try:
        return json.loads((folder / NOTE_FILE).read_text(encoding="utf-8")) == _note(adapter)
    except (OSError, ValueError):
        return False


def _empty(network: PreTrainedModel) -> PreTrainedModel:
    """The architecture with dense layers, on the meta device."""
    config = AutoConfig.for_model(**network.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        dense = auto_class(config).from_config(config)
    dense.generation_config = network.generation_config
    return dense.to(torch.bfloat16)


def _layers(network: PreTrainedModel) -> dict[str, QuantizedLinear | LoraQuantizedLinear]:
    """Packed layers by their names in the dense model, with adapters where they have one."""
    tuned = {name: module for name, module in network.named_modules() if isinstance(module, LoraQuantizedLinear)}
    packed = {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    return tuned | {name: module for name, module in packed.items() if name.removesuffix(".base_layer") not in tuned}


def _dense_tensors(
    name: str, layer: QuantizedLinear | LoraQuantizedLinear, dense: PreTrainedModel
) -> dict[str, Tensor]:
    """`weight`, as the architecture has it, and `bias`."""
    base = layer if isinstance(layer, QuantizedLinear) else layer.get_base_layer()
    assert isinstance(base, QuantizedLinear)
    weight = base.weight
    if isinstance(layer, LoraQuantizedLinear):
        out, into = layer.factors()
        weight = weight + (out @ into).detach()
    try:
        is_turned = isinstance(dense.get_submodule(name), Conv1D)
    except AttributeError:
        is_turned = False
    tensors = {"weight": weight.T if is_turned else weight}
    return tensors if base.bias is None else tensors | {"bias": base.bias}


def _stored(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to(torch.bfloat16).contiguous() if tensor.is_floating_point() else tensor
