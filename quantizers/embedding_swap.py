"""A network's token embeddings or output head for packed ones, with whatever shares their weight."""

from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from quantizers.block_format import BlockFormat
from quantizers.embedding import PackedRows, QuantizedEmbedding, QuantizedHead, TiedEmbedding, TiedHead


class Scale(NamedTuple):
    """What an embedding multiplies its rows with; `is_rounded` to their dtype first, as Gemma does."""

    factor: float
    is_rounded: bool


def embedding_scale(embedding: nn.Module) -> Scale | None:
    """The scale of an embedding that does no more with its weight than to look rows up and scale them; else None."""
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        return None
    if {name for name, _ in embedding.named_parameters()} != {"weight"}:
        return None
    if type(embedding) is nn.Embedding:
        return Scale(1.0, False)
    rounded, plain = (getattr(embedding, name, None) for name in ("scalar_embed_scale", "embed_scale"))
    scale = rounded if rounded is not None else plain
    return Scale(float(scale), rounded is not None) if isinstance(scale, float | int) else None


def input_embeddings(network: PreTrainedModel) -> str | None:
    """The module that holds the weight of the token embeddings, which others may share; None if there is none."""
    try:
        wanted = network.get_input_embeddings()
    except NotImplementedError:
        return None
    name = next((name for name, module in network.named_modules() if module is wanted), None)
    source = network.all_tied_weights_keys.get(f"{name}.weight")
    return name if source is None else source.removesuffix(".weight")


def tied_to(network: PreTrainedModel, name: str) -> list[str]:
    """Modules whose weight is that of module `name`."""
    ties = network.all_tied_weights_keys
    return [target.removesuffix(".weight") for target, source in ties.items() if source == f"{name}.weight"]


def is_packable(network: PreTrainedModel, name: str) -> bool:
    """Whether `swap_in` knows the module, and all that are tied to it.

    That is: the token embeddings, or an output head that shares no weight.
    """
    module, tied = network.get_submodule(name), [network.get_submodule(each) for each in tied_to(network, name)]
    if name == input_embeddings(network):
        scale = embedding_scale(module)
        return scale is not None and all(type(each) is nn.Linear or embedding_scale(each) == scale for each in tied)
    is_shared = tied or f"{name}.weight" in network.all_tied_weights_keys
    return module is network.get_output_embeddings() and type(module) is nn.Linear and not is_shared


def swap_in(network: PreTrainedModel, name: str, shape: tuple[int, int], form: BlockFormat) -> PackedRows:
    """Put a packed module in the place of `name`, for which `is_packable`, on whatever device is current.

    Returns:
        the new module, to be filled.
    """
    old = network.get_submodule(name)
    assert isinstance(old.weight, torch.Tensor)
    scale = embedding_scale(old)
    if scale is None:
        head = QuantizedHead(shape, form, old.weight.dtype, bias=old.bias is not None)
        network.set_submodule(name, head)
        return head
    embedding = QuantizedEmbedding(shape, form, old.weight.dtype, scale.factor, scale_is_rounded=scale.is_rounded)
    tied = tied_to(network, name)
    _forget_ties(network, {f"{other}.weight" for other in tied})
    network.set_submodule(name, embedding)
    for other in tied:
        module = network.get_submodule(other)
        if isinstance(module, nn.Linear):
            network.set_submodule(other, TiedHead(embedding, module.bias))
        else:
            network.set_submodule(other, TiedEmbedding(embedding))
    return embedding


def _forget_ties(network: PreTrainedModel, targets: set[str]) -> None:
    """So that `tie_weights` and `save_pretrained` do not look for the parameters of these names."""
    for path, part in network.named_modules():
        if isinstance(part, PreTrainedModel):
            prefix = f"{path}." if path else ""
            kept = part.get_expanded_tied_weights_keys().items()
            part._tied_weights_keys = {name: source for name, source in kept if prefix + name not in targets}
            for name in targets:
                part.all_tied_weights_keys.pop(name.removeprefix(prefix), None)
