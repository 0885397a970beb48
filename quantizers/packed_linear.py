"""The product of a packed layer as one operator, for `torch.compile`: opaque to it, so that no graph is broken.

An operator takes tensors and numbers, and what a layer stores comes and goes with the kernels' layout; so a layer is
named by a number, under which this process knows it as long as it lives. A graph is made for that number: compile a
network as a whole, not block by block. Eager code, and what is exported, calls the layer itself.
"""

import itertools
from typing import Any, Protocol, runtime_checkable
from weakref import WeakValueDictionary

import torch
from torch import Tensor


@runtime_checkable
class PackedLayer(Protocol):
    """What has the weights."""

    def product(self, x: Tensor) -> Tensor:
        """x W^T in the dtype of `x`."""
        ...

    def back(self, gradient: Tensor) -> Tensor:
        """The gradient of that product -> of its `x`."""
        ...


_LAYERS: "WeakValueDictionary[int, PackedLayer]" = WeakValueDictionary()
_NUMBERS = itertools.count()
TAGS = (torch.Tag.cudagraph_unsafe,)  # the kernels' layout is made by the first product, and goes when the layer moves


def numbered(layer: PackedLayer) -> int:
    """A number by which `packed_linear` finds it."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return number


def is_traced() -> bool:
    """Is `torch.compile` at work, and not an export, whose program would hold a number that means nothing elsewhere?"""
    return torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag  # is_exporting() lies in torch 2.11


@torch.library.custom_op("bitsmith::packed_linear", mutates_args=(), tags=TAGS)
def packed_linear(x: Tensor, layer: int, out_features: int) -> Tensor:
    """x [..., in] -> x W^T [..., out] in the dtype of `x`; no autocast."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return _LAYERS[layer].product(x).contiguous()


@torch.library.custom_op("bitsmith::packed_linear_back", mutates_args=(), tags=TAGS)
def packed_linear_back(gradient: Tensor, layer: int, in_features: int) -> Tensor:
    """The gradient [..., out] of the product -> that of its input [..., in]."""
    with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
        return _LAYERS[layer].back(gradient).contiguous()


@packed_linear.register_fake
def _(x: Tensor, layer: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@packed_linear_back.register_fake
def _(gradient: Tensor, layer: int, in_features: int) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], in_features)


def _remember(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    x, ctx.layer, _ = inputs
    ctx.in_features = x.shape[-1]


def _back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return packed_linear_back(gradient, ctx.layer, ctx.in_features), None, None


packed_linear.register_autograd(_back, setup_context=_remember)
