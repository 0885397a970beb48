"""A mixture's experts as linear layers, one by one, in place of the 3-D parameters that transformers fuses them into.

    <mlp>.experts.gate_up_proj  [experts, 2 * inner, width]    becomes    <mlp>.experts.<i>.gate_up   [2 * inner, width]
    <mlp>.experts.down_proj     [experts, width, inner]                   <mlp>.experts.<i>.down      [width, inner]

(`up` where there is no gate.) So each expert is a matrix like any other: with statistics of the tokens that reach it, a
choice of its own, and a packed layer in its place.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

UP, DOWN = "up_proj", "down_proj"
LAYER_NAMES = {"gate_up_proj": "gate_up", UP: "up", DOWN: "down"}  # fused parameter -> layer of an expert


class Expert(nn.Module):
    """One expert: `up` or `gate_up`, the mixture's own gate or activation, `down`."""

    def __init__(self, first_name: str, first: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.first_name = first_name
        self.add_module(first_name, first)
        self.down = down

    def forward(self, x: Tensor, gate: Any) -> Tensor:
        """[tokens, width] of the tokens that reach this expert."""
        return self.down(gate(self.get_submodule(self.first_name)(x)))


class ExpertLayers(nn.Module):
    """Takes the place of a fused module of experts, whose weights it takes over.

    Args:
        fused: as `is_fused` wants it; it is of no use afterwards.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        first = "gate_up_proj" if fused.has_gate else UP
        self.num_experts: int = fused.num_experts  # type: ignore[assignment]
        for index in range(self.num_experts):
            layers = (_layer(fused, name, index) for name in (first, DOWN))
            self.add_module(str(index), Expert(LAYER_NAMES[first], *layers))
        for name in [name for name, _ in fused.named_parameters(recurse=False)]:
            delattr(fused, name)
        kind: Any = type(fused)  # a bound method would not pickle: its name is another one than its attribute's
        self._gate = partial(kind._apply_gate, fused) if fused.has_gate else fused.act_fn

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the experts that the router chose.

        Args:
            hidden_states: [tokens, width].
            top_k_index: int64 [tokens, k], the experts of each token.
            top_k_weights: [tokens, k].
        """
        total = torch.zeros_like(hidden_states)
        if hidden_states.is_meta:  # nobody knows which tokens go where: an equal share to each
            share = -(-top_k_index.numel() // self.num_experts)
            for index in range(self.num_experts):
                total[:share] += self._expert(index)(hidden_states[:share], self._gate)
            return total
        for index in range(self.num_experts):
            tokens, places = torch.where(top_k_index == index)
            if len(tokens):
                answer = self._expert(index)(hidden_states[tokens], self._gate) * top_k_weights[tokens, places, None]
                total.index_add_(0, tokens, answer.to(total.dtype))
        return total

    def _expert(self, index: int) -> Expert:
        return self.get_submodule(str(index))  # type: ignore[return-value]


def is_fused(module: nn.Module) -> bool:
    """Is it a module of experts whose computation `ExpertLayers` knows?"""
    down, first = (getattr(module, name, None) for name in (DOWN, _first_name(module)))
    gate = "_apply_gate" if getattr(module, "has_gate", True) else "act_fn"
    is_known = all(hasattr(module, name) for name in ("num_experts", "has_gate", gate))
    if not is_known or getattr(module, "has_post_expert_norm", False):
        return False
    return all(isinstance(each, nn.Parameter) and each.dim() == 3 for each in (first, down))


def _first_name(module: nn.Module) -> str:
    return "gate_up_proj" if getattr(module, "has_gate", True) else UP


def fused_experts(network: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, of all that `set_experts_apart` would replace."""
    return {name: module for name, module in network.named_modules() if is_fused(module)}


def set_experts_apart(network: nn.Module) -> None:
    """Replace all fused experts of `network`, in place; their weights share the memory of the fused ones."""
    for name, fused in fused_experts(network).items():
        network.set_submodule(name, ExpertLayers(fused))


def _layer(fused: nn.Module, name: str, index: int) -> nn.Linear:
    weight, bias = getattr(fused, name)[index].detach(), getattr(fused, f"{name}_bias", None)
    weight = weight.T if getattr(fused, "is_transposed", False) else weight
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=getattr(fused, name).requires_grad)
    if bias is not None:
        layer.register_parameter("bias", nn.Parameter(bias[index].detach(), requires_grad=bias.requires_grad))
    return layer
