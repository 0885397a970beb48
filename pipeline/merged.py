"""A dense bfloat16 model of a checkpoint with its adapter inside: W = Q + L1 L2 + B A, for programs that read no codes.

The folder is an ordinary one of transformers, as large as the original; what made it stands in merged.json.
"""

import json
import shutil
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.adapter import load_tuned
from pipeline.atomic import write_json
from pipeline.errors import CheckpointError, OutputExistsError
from pipeline.quiet import quiet_transformers
from pipeline.task import auto_class
from quantizers import QuantizedLinear
from quantizers.adapter import RECIPE_FILE, LoraQuantizedLinear


def check_merged_folder(folder: Path) -> None:
    """Raise OutputExistsError unless there is nothing, or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError(f"{folder} is there already, and a merged model needs a new folder. Name another.")


def write_merged(checkpoint: Path, adapter: Path, folder: Path) -> None:
    """Write it, whole or not at all.

    Takes the memory of the packed model and of the dense one in bfloat16.

    Raises:
        CheckpointError: see `load_tuned`; or the architecture fuses what is packed apart (mixtures of experts).
        OutputExistsError: `folder` holds something.
    """
    check_merged_folder(folder)
    tuned = load_tuned(checkpoint, adapter)
    network = cast(PreTrainedModel, tuned.get_base_model())
    dense = _empty(network)
    layers = _layers(network)
    inside = tuple(f"{name}." for name in layers)
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(inside)}
    for name, layer in layers.items():
        state |= {f"{name}.{key}": tensor for key, tensor in _dense_tensors(name, layer, dense).items()}
    missing = dense.state_dict().keys() - state.keys()
    if missing:
        raise CheckpointError(
            f"{type(dense).__name__} has the weight {min(missing)} in one piece, which the checkpoint packs apart: "
            "merging is not there for mixtures of experts. Use the adapter on the packed checkpoint."
        )
    dense.load_state_dict({name: _stored(tensor) for name, tensor in state.items()}, assign=True, strict=False)
    dense.tie_weights()
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet_transformers():
        dense.save_pretrained(partial)
        AutoTokenizer.from_pretrained(checkpoint, local_files_only=True).save_pretrained(partial)
    made_of = json.loads((adapter / RECIPE_FILE).read_text(encoding="utf-8"))
    write_json(partial / "merged.json", {"adapter": adapter.resolve().name, "adapter_recipe": made_of})
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)


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
