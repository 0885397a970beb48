"""What a model takes in memory while it runs in float32, from its headers and its code on the meta device."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from pipeline.layered import NotLayeredError, blocks_of
from pipeline.model import Model
from pipeline.quiet import quiet_transformers
from pipeline.structure import block_names, build_skeleton
from pipeline.task import task_of

FLOAT32_BYTES = 4
NUM_PROBE_TOKENS = 32


@dataclass(frozen=True)
class ModelMemory:
    """Bytes in float32.

    Attributes:
        around_bytes: what is always there: embeddings, head and norms outside of all blocks; a tied tensor once.
        block_bytes: the weights of each block that is read when it is wanted; empty where all are held at once.
        kept_bytes_a_token: what autograd keeps in the block where that is most, without weights; of the whole model
            where it has no blocks.
    """

    around_bytes: int
    block_bytes: tuple[int, ...]
    kept_bytes_a_token: float

    @property
    def weight_bytes(self) -> int:
        """All weights that text calls."""
        return self.around_bytes + sum(self.block_bytes)

    @property
    def largest_block_bytes(self) -> int:
        """The weights of the largest block; 0 where none is held by itself."""
        return max(self.block_bytes, default=0)


def model_memory(model: Model) -> ModelMemory:
    """Takes half a second, and no memory."""
    skeleton = build_skeleton(model.config, experts_apart=model.experts_apart).requires_grad_(False)
    sizes = {name: FLOAT32_BYTES * each.numel() for name, each in skeleton.named_parameters()}
    is_read = all(name in model.tensors or name in model.ties for name in sizes)  # see MergedError

    def within(blocks: Iterable[str]) -> list[int]:
        return [sum(nbytes for name, nbytes in sizes.items() if name.startswith(f"{block}.")) for block in blocks]

    try:
        names, _ = blocks_of(model) if is_read else ([], None)
    except NotLayeredError:
        names = []
    if not names:
        return ModelMemory(sum(sizes.values()), (), _kept_by_layers(model))
    around = sum(sizes.values()) - sum(within(block_names(skeleton)))
    try:
        kept = _kept_bytes_a_token(skeleton, names)
    except Exception:  # a pass without values: some models look at values, and their own code may raise anything
        kept = _kept_by_layers(model)
    return ModelMemory(around, tuple(within(names)), kept)


def _kept_bytes_a_token(skeleton: PreTrainedModel, names: list[str]) -> float:
    """Attention probabilities are left out: the fused attention of a real pass does not keep them."""
    weights = {each.untyped_storage()._cdata for each in skeleton.parameters()}
    kept: dict[str, dict[int, Tensor]] = {name: {} for name in names}
    inside: list[str] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        is_square = tensor.dim() > 2 and tensor.shape[-1] == tensor.shape[-2] == NUM_PROBE_TOKENS
        if inside and storage not in weights and tensor.is_floating_point() and not is_square:
            kept[inside[-1]][storage] = tensor  # held, so that no storage comes twice
        return tensor

    def enter(name: str):
        return lambda module, inputs: inside.append(name)

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        inside.clear()

    def begin(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output.requires_grad_(True).clone()  # no leaf: some models go on in place

    skeleton.get_input_embeddings().register_forward_hook(begin)
    for name in names:
        block = skeleton.get_submodule(name)
        block.register_forward_pre_hook(enter(name))
        block.register_forward_hook(leave)
    tokens = torch.zeros(1, NUM_PROBE_TOKENS, dtype=torch.long, device="meta")
    with quiet_transformers(), torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        skeleton(**task_of(skeleton.config).probe_inputs(tokens))
    most = max(sum(tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in each.values())
               for each in kept.values())  # fmt: skip
    return FLOAT32_BYTES * most / NUM_PROBE_TOKENS


def _kept_by_layers(model: Model) -> float:
    """About: each layer's input and output, and half as much between the layers."""
    return 1.5 * FLOAT32_BYTES * sum(sum(matrix.shape) for matrix in model.matrices)
