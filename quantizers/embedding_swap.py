"""A network's token embeddings or output head for packed ones, with whatever shares their weight."""

import torch
from torch import nn
from transformers import PreTrainedModel

from quantizers.block_format import BlockFormat
from quantizers.embedding import PackedRows, QuantizedEmbedding, QuantizedHead, TiedEmbedding, TiedHead


def embedding_scale(embedding: nn.Module) -> float | None:
    """What an embedding multiplies the rows of its weight with; None where it does something else with them."""
    if type(embedding) is nn.Embedding:
        return 1.0
    if not isinstance(embedding, nn.Embedding):
        return None
    if isinstance(rounded := getattr(embedding, "scalar_embed_scale", None), float | int):
        # Gemma keeps it in the weight's dtype; a skeleton is built with `meta` as the device
        return float(torch.tensor(rounded, dtype=embedding.weight.dtype, device="cpu"))
    scale = getattr(embedding, "embed_scale", None)
    return float(scale) if isinstance(scale, float | int) else None


def tied_to(network: PreTrainedModel, name: str) -> list[str]:
    """Modules whose weight is that of module `name`."""
    ties = network.all_tied_weights_keys
    return [target.removesuffix(".weight") for target, source in ties.items() if source == f"{name}.weight"]


def input_embeddings(network: PreTrainedModel) -> str | None:
    """The module that holds the weight of the token embeddings, which others may share; None if there is none."""
    wanted = network.get_input_embeddings()
    name = next((name for name, module in network.named_modules() if module is wanted), None)
    source = network.all_tied_weights_keys.get(f"{name}.weight")
    return name if source is None else source.removesuffix(".weight")


def is_packable(network: PreTrainedModel, name: str) -> bool:
    """Whether `swap_in` knows the module, and all that are tied to it.

    That is: the token embeddings, or an output head that shares no weight.
    """
    module, tied = network.get_submodule(name), [network.get_submodule(each) for each in tied_to(network, name)]
    if name == input_embeddings(network):
        scale = embedding_scale(module)
        return scale is not None and all(type(each) is nn.Linear or embedding_scale(each) == scale for each in tied)
    is_source_or_target = tied or f"{name}.weight" in network.all_tied_weights_keys
    return module is network.get_output_embeddings() and type(module) is nn.Linear and not is_source_or_target


def swap_in(network: PreTrainedModel, name: str, shape: tuple[int, int], form: BlockFormat) -> PackedRows:
    """Put a packed module in the place of `name`, for which `is_packable`, on whatever device is current.

    Returns:
        the new module, to be filled.
    """
    old = network.get_submodule(name)
    assert isinstance(old.weight, torch.Tensor)
    if not isinstance(old, nn.Embedding):
        head = QuantizedHead(shape, form, old.weight.dtype, bias=old.bias is not None)
        network.set_submodule(name, head)
        return head
    embedding = QuantizedEmbedding(shape, form, old.weight.dtype, embedding_scale(old) or 1.0)
    tied = tied_to(network, name)
    network.set_submodule(name, embedding)
    for other in tied:
        module = network.get_submodule(other)
        if isinstance(module, nn.Linear):
            network.set_submodule(other, TiedHead(embedding, module.bias))
        else:
            network.set_submodule(other, TiedEmbedding(embedding))
        del network.all_tied_weights_keys[f"{other}.weight"]
    if tied:
        for part in network.modules():
            if isinstance(part, PreTrainedModel):
                part._tied_weights_keys = {}  # `tie_weights` would look for the weight again
    return embedding
