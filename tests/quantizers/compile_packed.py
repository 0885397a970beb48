"""Packed layers under `torch.compile`, in a process whose functions nobody has wrapped.

The tests' type checks are no code that it can trace.

    python -m tests.quantizers.compile_packed       # prints the names of what held, as JSON
"""

import copy
import json
import sys

import torch
from torch import nn

from quantizers import (
    AbstractQuantizer,
    Integer,
    LatticeCoded,
    LloydMax,
    LowRankPlus,
    NormalFloat,
    QuantizedLinear,
    TrellisCoded,
    hadamard,
)
from quantizers.embedding_swap import swap_in
from quantizers.packed_linear import packed_linear
from tests.pipeline.tiny_packed import packed_llama, random_windows
from tests.quantizers.helpers import normal_weight, quantizer_id

SHAPE = (24, 100)
QUANTIZERS: list[AbstractQuantizer] = [
    NormalFloat(4),
    LowRankPlus(LloydMax(3, 32, 4), 3, 8),
    Integer(3, 32, 4),
    TrellisCoded(3),
    LatticeCoded(2),
]


def layer_of(quantizer: AbstractQuantizer, seed: int = 0) -> QuantizedLinear:
    return QuantizedLinear.from_quantized(quantizer.quantize(normal_weight(SHAPE, seed)), normal_weight((1, 24))[0])


def inputs(*leading: int) -> torch.Tensor:
    return torch.randn(*leading, 100, generator=torch.Generator().manual_seed(7))


def one_graph_with_the_eager_numbers(quantizer: AbstractQuantizer) -> None:
    layer = layer_of(quantizer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ours, theirs = inputs(2, 3).requires_grad_(), inputs(2, 3).requires_grad_()
    found, expected = compiled(ours), layer(theirs)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(8))
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)


def operator_is_what_it_says() -> None:
    layer = layer_of(QUANTIZERS[1])
    for x in (inputs(4).requires_grad_(), inputs(2, 3).bfloat16(), inputs(0)):
        torch.library.opcheck(packed_linear, (x, layer.number, 24))


def copy_is_a_layer_of_its_own() -> None:
    layer, other = layer_of(LloydMax(3)), layer_of(LloydMax(3), seed=1)
    copied = copy.deepcopy(layer)
    copied.load_state_dict(other.state_dict())
    compiled = torch.compile(nn.Sequential(copied), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs(3)), other(inputs(3)))


def autocast_gives_the_same_numbers_in_float32() -> None:
    """Compiled layers do not follow autocast; what they compute is as exact as without it."""
    layer = layer_of(NormalFloat(4))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found = compiled(inputs(3))
    torch.testing.assert_close(found.float(), layer(inputs(3)), rtol=0.02, atol=0.02)


def exported_program_has_the_weights_itself() -> None:
    layer = layer_of(NormalFloat(4))
    exported = torch.export.export(layer, (inputs(3),))
    assert "bitsmith" not in exported.graph_module.code
    torch.testing.assert_close(exported.module()(inputs(3)), layer(inputs(3)))


def exported_trellis_leaves_eager_layers_alone() -> None:
    """Also where nothing ran before: signs and factors of a rotation are kept for the process."""
    for cached in (hadamard._signs_on, hadamard._factors_on, hadamard._factors):
        cached.cache_clear()
    layer = QuantizedLinear.from_quantized(TrellisCoded(3).quantize(normal_weight(SHAPE)), None)
    for cached in (hadamard._signs_on, hadamard._factors_on, hadamard._factors):
        cached.cache_clear()
    exported = torch.export.export(layer, (inputs(3),))
    found = layer(inputs(3))
    assert type(found) is torch.Tensor
    torch.testing.assert_close(exported.module()(inputs(3)), found)


def exported_network_takes_any_length() -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = packed_llama()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.network(input_ids=tokens, use_cache=False).logits

    module, tokens = Logits(), random_windows(1)
    with torch.no_grad():
        length = torch.export.Dim("length", min=2, max=64)
        exported = torch.export.export(module, (tokens[:, :12],), dynamic_shapes=({1: length},)).module()
        for num_tokens in (5, 12, 16):
            torch.testing.assert_close(exported(tokens[:, :num_tokens]), module(tokens[:, :num_tokens]))


def network_is_one_graph(label: str, *, has_packed_tables: bool = False) -> None:
    network, tokens = packed_llama(label), random_windows(2)
    if has_packed_tables:
        table = LloydMax(4).quantize(network.model.embed_tokens.weight)  # the head's, too
        swap_in(network, "model.embed_tokens", table.shape, table.format).fill(table)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(found, network(input_ids=tokens, use_cache=False).logits)


def main() -> None:
    """See the module's docstring."""
    held = []
    for quantizer in QUANTIZERS:
        one_graph_with_the_eager_numbers(quantizer)
        held.append(quantizer_id(quantizer))
        torch._dynamo.reset()
    for check in (
        operator_is_what_it_says,
        copy_is_a_layer_of_its_own,
        autocast_gives_the_same_numbers_in_float32,
        exported_program_has_the_weights_itself,
        exported_trellis_leaves_eager_layers_alone,
        exported_network_takes_any_length,
    ):
        check()
        torch._dynamo.reset()
        held.append(check.__name__)
    for label in ("lloyd3-g32-s4-r2-f8", "trellis3"):
        network_is_one_graph(label)
        held.append(f"network of {label}")
        torch._dynamo.reset()
    network_is_one_graph("lloyd3-g32-s4", has_packed_tables=True)
    held.append("network with packed embeddings and head")
    json.dump(held, sys.stdout)


if __name__ == "__main__":
    main()
