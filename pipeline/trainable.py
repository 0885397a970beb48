"""What of a packed network can be trained without changing its size, and the network opened for it.

    factors    L1 and L2 of every layer with a low-rank part: `<module>.low_rank_out` and `.low_rank_in`
    norms      weights (and shifts) of the normalizations, by their names in the original, like the biases
    scales     of the codes: one gain a matrix, `<module>.weight_gain`, that all its stored scales are multiplied by
    biases     of the packed layers

Codes, embeddings and head stay frozen. Two zero factors stay zero: neither gives the other a gradient.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import RecipeError
from pipeline.memory import give_back, is_shortage
from pipeline.recovery_settings import Kind
from quantizers import QuantizedLinear
from quantizers.trainable import TrainableLinear

GAIN = "weight_gain"
FLAG = "gradient_checkpointing"  # of transformers' blocks; it counts in those that are in training


@contextmanager
def opened_for_training(
    network: PreTrainedModel,
    kinds: tuple[Kind, ...],
    *,
    dense_bytes: int,
    dense_dtype: torch.dtype,
    keep_activations: bool,
) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the parameters to train by their names; afterwards the network is as before.

    Inside, every packed layer is a `TrainableLinear`, nothing but the yielded parameters takes a gradient, and there is
    no dropout.

    Args:
        dense_bytes: memory that dense copies of weights may take; the layers that come first get them.
        dense_dtype: of those copies.
        keep_activations: instead of computing each block's again in the backward pass (gradient checkpointing); the
            gradients are the same.
    Raises:
        RecipeError: the network has nothing of these kinds.
    """
    requires_grad = {parameter: parameter.requires_grad for parameter in network.parameters()}
    flags = {module: module.gradient_checkpointing for module in network.modules() if hasattr(module, FLAG)}
    training = {module: module.training for module in network.modules()}
    packed = {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    values: dict[nn.Parameter, torch.Tensor] = {}
    try:
        network.requires_grad_(False)
        for name, layer in packed.items():
            network.set_submodule(name, TrainableLinear(layer))
        _keep_dense(network, dense_bytes, dense_dtype)
        chosen = _parameters(network, kinds, packed)
        values = {parameter: parameter.detach().clone() for parameter in chosen.values()}
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in chosen)
        if keep_activations or not network.supports_gradient_checkpointing:
            network.eval()
        else:
            checkpoint_activations(network)
        yield chosen
    finally:
        for name, layer in packed.items():
            network.set_submodule(name, layer)
        for parameter, value in values.items():
            parameter.grad = None
            with torch.no_grad():
                parameter.copy_(value)
        if _recomputes_activations(network):
            getattr(network, "activation_checkpointing_disable", network.gradient_checkpointing_disable)()
        for module, flag in flags.items():
            setattr(module, FLAG, flag)
        for parameter, required in requires_grad.items():
            parameter.requires_grad_(required)
        for module, was_training in training.items():
            module.training = was_training


def save_memory(network: PreTrainedModel) -> bool:
    """From now on dequantize for each product and compute activations again; False where both were so already."""
    had_copies = _drop_dense(network)
    can_recompute = network.supports_gradient_checkpointing and not _recomputes_activations(network)
    if can_recompute:
        checkpoint_activations(network)
    return had_copies or can_recompute


def _recomputes_activations(network: PreTrainedModel) -> bool:
    return any(module.training and getattr(module, FLAG, False) for module in network.modules())


def _keep_dense(network: PreTrainedModel, dense_bytes: int, dtype: torch.dtype) -> None:
    """Copies for the layers that come first, within that many bytes; none at all where memory runs out before."""
    try:
        for layer in _layers(network):
            dense_bytes -= layer.layer.out_features * layer.layer.in_features * dtype.itemsize
            if dense_bytes >= 0:
                layer.keep_dense(dtype)
    except Exception as error:
        if not is_shortage(error):
            raise
        _drop_dense(network)
        give_back()


def _drop_dense(network: PreTrainedModel) -> bool:
    """Were there copies?"""
    had_copies = any(layer.dense is not None for layer in _layers(network))
    for layer in _layers(network):
        layer.dense = None
    return had_copies


def _layers(network: PreTrainedModel) -> list[TrainableLinear]:
    return [module for module in network.modules() if isinstance(module, TrainableLinear)]


def _parameters(
    network: PreTrainedModel, kinds: tuple[Kind, ...], packed: dict[str, QuantizedLinear]
) -> dict[str, nn.Parameter]:
    norms = [name for name, module in network.named_modules() if "norm" in type(module).__name__.lower()]
    found: dict[Kind, set[str]] = {
        "factors": {f"{name}.{factor}" for name in packed for factor in ("low_rank_out", "low_rank_in")},
        "norms": {f"{name}.{parameter}" for name in norms for parameter in ("weight", "bias")},
        "scales": {f"{name}.{GAIN}" for name in packed},
        "biases": {f"{name}.bias" for name in packed},
    }
    wanted = set().union(*(found[kind] for kind in kinds))
    chosen = {name: parameter for name, parameter in network.named_parameters() if name in wanted}
    if not chosen:
        raise RecipeError(
            f"Nothing can be trained: of {', '.join(kinds) or 'no kind at all'}, this model with its {len(packed)} "
            "packed layers has none. Train `norms` and `scales` too, or compress with a rank above 0 so that there are "
            "factors."
        )
    return chosen


def checkpoint_activations(network: PreTrainedModel) -> None:
    """Gradient checkpointing without dropout: transformers checkpoints a block if that block itself is in training."""
    # transformers 5.23 renamed it
    enable = getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)
    enable({"use_reentrant": False})  # that kind takes frozen embeddings, and a gradient for parameters only
    for module in network.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))
