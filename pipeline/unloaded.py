"""A network without weights, which are read when they are wanted.

held = Unloaded(model, "cpu", blocks)   # embeddings, norms and head are there, the blocks are not
with held.block("model.layers.3"):
    ...                                 # its weights are read now, and let go at the end

network = streamed(model, "cpu")        # a network that does so whenever one of its blocks is called
"""

import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pipeline.errors import ModelError
from pipeline.memory import free_bytes
from pipeline.model import Model
from pipeline.model_config import read_config
from pipeline.own_code import brings_code
from pipeline.quiet import quiet_transformers
from pipeline.structure import block_names, build_skeleton
from pipeline.task import auto_class
from quantizers.experts import set_experts_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE_SHARE = 0.5  # of the free memory: what takes less is loaded as a whole


class MergedError(ModelError):
    """Some weights are merged on loading, so that reading them is not enough."""


class Unloaded:
    """A network in eval mode and float32 that takes no gradients of weights.

    Attributes:
        network: its buffers, and the parameters outside of `blocks`, are on `device`; all others on the meta device.
        weights: reads them.
    Raises:
        MergedError: the network has a parameter that is not stored.
    """

    def __init__(self, model: Model, device: str, blocks: Collection[str]) -> None:
        self.weights, self.network = Weights(model, torch.device(device)), _without_weights(model)
        for name, _ in self.network.named_parameters():
            if name not in model.tensors and name not in model.ties:
                raise MergedError(f"{name} of {model.spec} is made from several tensors on loading.")
        self._fill(tuple(f"{name}." for name in blocks))

    @contextmanager
    def block(self, name: str) -> Iterator[None]:
        """The weights of a block, inside."""
        with self.weights.inside(self.network.get_submodule(name), name):
            yield

    def weight_bytes(self, name: str) -> int:
        """Of a block, while it is there."""
        return sum(each.nbytes for each in self.network.get_submodule(name).parameters())

    def _fill(self, prefixes: tuple[str, ...]) -> None:
        """Everything that does not begin with one of `prefixes`; a tied tensor once."""
        read: dict[str, nn.Parameter] = {}
        for name, _ in self.network.named_parameters(remove_duplicate=False):
            if not name.startswith(prefixes):
                source = self.weights.source(name)
                if source not in read:
                    read[source] = self.weights.read(source)
                _assign(self.network, name, read[source])
        for name, buffer in self.network.named_buffers():
            if not name.startswith(prefixes) and name in self.weights.model.tensors:
                buffer.copy_(self.weights.read(name))
        for buffered in self.network.modules():
            for name, buffer in buffered.named_buffers(recurse=False):
                buffered._buffers[name] = buffer.to(self.weights.device)


@dataclass(frozen=True)
class Weights:
    """Of a model, read one by one onto a device in float32. Knows no network."""

    model: Model
    device: torch.device

    @contextmanager
    def inside(self, block: nn.Module, name: str) -> Iterator[None]:
        """The weights of `block`, which the model calls `name`, are there inside."""
        parameters = dict(block.named_parameters())
        try:
            for leaf in parameters:
                _assign(block, leaf, self.read(f"{name}.{leaf}"))
            for leaf, buffer in block.named_buffers():
                if f"{name}.{leaf}" in self.model.tensors:
                    buffer.copy_(self.read(f"{name}.{leaf}"))
            yield
        finally:
            for leaf, parameter in parameters.items():
                _assign(block, leaf, parameter)

    def source(self, name: str) -> str:
        """The stored tensor of a parameter, which may be tied to another one's."""
        return name if name in self.model.tensors else self.model.ties[name]

    def read(self, name: str) -> nn.Parameter:
        """A parameter; integers keep their type."""
        stored = self.model.tensor(self.source(name))
        dtype = torch.float32 if stored.is_floating_point() else stored.dtype
        # a copy, for a tensor in a mapped file lies at any address, on which the last bits of products depend
        return nn.Parameter(stored.to(self.device, dtype, copy=True), requires_grad=False)


def original_network(model: Model, device: str) -> "PreTrainedModel":
    """The model in float32, in eval mode: in memory where there is room for it, else streamed if it can be."""
    if is_whole(model, device):
        return model.load(device)
    try:
        return streamed(model, device)
    except MergedError:
        return model.load(device)


def is_whole(model: Model, device: str) -> bool:
    """Is there room for the whole model in float32, on its device and in the machine's memory, where it is loaded?"""
    free = min(free_bytes(torch.device(device)), free_bytes(torch.device("cpu")))
    return 4 * model.num_params <= WHOLE_SHARE * free


def streamed(model: Model, device: str) -> "PreTrainedModel":
    """The network, with the weights of a block in memory only while it is called.

    Raises:
        MergedError: see Unloaded.
    """
    names = block_names(build_skeleton(model.config, experts_apart=model.experts_apart))
    held = Unloaded(model, device, names)
    for name in names:
        block = held.network.get_submodule(name)
        block.forward = _loading(held.weights, block, name)
    return held.network


def _loading(weights: Weights, block: nn.Module, name: str) -> Callable[..., Any]:
    """The block's own forward pass, with its weights there.

    It knows the block weakly, or a network of gigabytes would wait for the garbage collector.
    """
    known, real = weakref.ref(block), type(block).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        called = known()
        assert called is not None, "it is being called"
        with weights.inside(called, name):
            return real(called, *args, **kwargs)

    return forward


def _without_weights(model: Model) -> "PreTrainedModel":
    """Parameters on the meta device; buffers, which its code computes, are real."""
    config = read_config(
        model.path, trust_remote_code=model.trust_remote_code
    )  # not model.config, where the skeleton has set eager attention
    config.architectures = model.config.architectures
    handle = register_module_parameter_registration_hook(_on_meta)  # type: ignore[arg-type]
    try:
        with quiet_transformers():
            network = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=brings_code(config))
    finally:
        handle.remove()
    if model.experts_apart:
        set_experts_apart(network)
    return network.eval().requires_grad_(False)


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    return parameter if parameter.is_meta else nn.Parameter(parameter.to("meta"), parameter.requires_grad)


def _assign(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    module.get_submodule(parent)._parameters[leaf] = parameter
