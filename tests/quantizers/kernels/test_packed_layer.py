"""`QuantizedLinear` with kernels, in the interpreter: the same results, state and gradients as without."""

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn

from quantizers import (
    AbstractQuantizer,
    Integer,
    KMeans,
    LatticeCoded,
    LloydMax,
    LowRankPlus,
    NormalFloat,
    QuantizedLinear,
    TrellisCoded,
)
from quantizers.kernels.block_weight import BlockWeight
from quantizers.kernels.switch import KERNELS
from tests.quantizers.helpers import normal_weight, quantizer_id
from tests.quantizers.kernels.cases import assert_near, inputs

SHAPE = (24, 100)
QUANTIZERS: list[AbstractQuantizer] = [
    NormalFloat(4, scale="absmax"),
    LowRankPlus(LloydMax(3, 32, 4, scale="absmax"), 3, max_iterations=1),
    LowRankPlus(LloydMax(2, scale="absmax"), 3, 8, max_iterations=1),
    LowRankPlus(Integer(3, 32, 4), 2, 4, max_iterations=1),
    KMeans(2),
    LowRankPlus(TrellisCoded(2), 2, max_iterations=1),
]
pytestmark = pytest.mark.usefixtures("_kernels_on_the_cpu")
for_quantizers = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=quantizer_id)
WITH_LOW_RANK = QUANTIZERS[1]


def layer_and_dense(quantizer: AbstractQuantizer, bias: Tensor | None = None) -> tuple[QuantizedLinear, Tensor]:
    quantized = quantizer.quantize(normal_weight(SHAPE))
    return QuantizedLinear.from_quantized(quantized, bias), quantized.dequantize()


def uses_kernels(layer: QuantizedLinear) -> bool:
    return layer.weight_packed is None


@for_quantizers
def test_forward_is_the_dense_product(quantizer: AbstractQuantizer) -> None:
    bias = normal_weight((1, 24))[0]
    layer, dense = layer_and_dense(quantizer, bias)
    for rows in (1, 3, 20):
        x = inputs(rows, 100, torch.float32)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, bias), rtol=1e-5, atol=1e-5)
        assert uses_kernels(layer)


@pytest.mark.parametrize("leading", [(), (2, 3), (0,), (0, 4), (2, 1, 9)], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    layer, dense = layer_and_dense(WITH_LOW_RANK)
    x = torch.randn(*leading, 100, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(layer(x), x @ dense.T, rtol=1e-5, atol=1e-5)


@for_quantizers
def test_the_weight_is_the_dense_one(quantizer: AbstractQuantizer) -> None:
    layer, dense = layer_and_dense(quantizer)
    torch.testing.assert_close(layer.weight, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantizer", [QUANTIZERS[1], QUANTIZERS[-1]], ids=quantizer_id)
def test_the_gradient_is_the_dense_one(quantizer: AbstractQuantizer, dtype: torch.dtype) -> None:
    layer, dense = layer_and_dense(quantizer)
    x = inputs(3, 100, dtype).requires_grad_()
    y = layer(x)
    upstream = inputs(3, 24, dtype)
    y.backward(upstream)
    assert x.grad is not None
    assert_near(y, nn.functional.linear(x.float(), dense).to(dtype), dtype)
    assert_near(x.grad, (upstream.float() @ dense).to(dtype), dtype)


def test_backward_keeps_no_dense_weight() -> None:
    layer, _ = layer_and_dense(QUANTIZERS[0])
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        layer(inputs(2, 100, torch.float32).requires_grad_())
    assert max(saved, default=0) < SHAPE[0] * SHAPE[1] // 4


@for_quantizers
def test_state_and_what_is_stored_stay_the_same(quantizer: AbstractQuantizer) -> None:
    layer, _ = layer_and_dense(quantizer, torch.ones(24))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(inputs(1, 100, torch.float32))
    assert uses_kernels(layer)
    for after in (layer.state_dict(), layer.quantized().tensors() | {"bias": before["bias"]}):
        assert set(after) == set(before)
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor)
            assert after[name].dtype == tensor.dtype


def test_codes_are_in_memory_once() -> None:
    layer, _ = layer_and_dense(QUANTIZERS[0])
    layer(inputs(1, 100, torch.float32))
    weight = layer._kernel_weight
    assert isinstance(weight, BlockWeight)
    assert not {*weight.replaces} & {name for name, tensor in layer.named_buffers() if tensor is not None}


@pytest.mark.parametrize(
    "change", [nn.Module.half, lambda layer: layer.to("cpu"), copy.deepcopy], ids=["half", "move", "copy"]
)
def test_a_layer_may_be_moved_cast_and_copied(change) -> None:
    layer, _ = layer_and_dense(WITH_LOW_RANK, torch.ones(24))
    x = inputs(2, 100, torch.float32)
    y = layer(x)
    state = layer.state_dict()
    changed = change(layer)
    for name, tensor in changed.state_dict().items():
        assert name == "bias" or torch.equal(tensor, state[name])
    torch.testing.assert_close(changed(x), y)


def test_another_state_may_be_loaded() -> None:
    layer, _ = layer_and_dense(WITH_LOW_RANK)
    other = QuantizedLinear.from_quantized(WITH_LOW_RANK.quantize(normal_weight(SHAPE, seed=1)), None)
    x = inputs(2, 100, torch.float32)
    expected = other(x)
    assert not torch.allclose(layer(x), expected)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), expected)


def test_a_layer_that_was_saved_with_torch_works() -> None:
    layer, dense = layer_and_dense(WITH_LOW_RANK)
    x = inputs(2, 100, torch.float32)
    with torch.inference_mode():
        layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(x), x @ dense.T, rtol=1e-5, atol=1e-5)


def test_under_autocast() -> None:
    for quantizer in (WITH_LOW_RANK, TrellisCoded(2)):
        layer, dense = layer_and_dense(quantizer)
        x = inputs(4, 100, torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert uses_kernels(layer)
        assert_near(y, (x @ dense.T).to(torch.bfloat16), torch.bfloat16)
        y.float().sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("quantizer", [LatticeCoded(2), NormalFloat(4)], ids=["kind without kernels", "float64"])
def test_what_kernels_do_not_serve_goes_through_torch(quantizer: AbstractQuantizer) -> None:
    layer, dense = layer_and_dense(quantizer)
    x = inputs(2, 100, torch.float64 if isinstance(quantizer, NormalFloat) else torch.float32)
    torch.testing.assert_close(layer(x).float(), x.float() @ dense.T, rtol=1e-5, atol=1e-5)
    assert not uses_kernels(layer)


def test_inputs_of_a_wrong_width_are_the_callers_error() -> None:
    layer, _ = layer_and_dense(WITH_LOW_RANK)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(inputs(2, 99, torch.float32))
    assert KERNELS.failure is None


def test_kernels_that_fail_leave_the_dense_packing_and_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    first, dense = layer_and_dense(WITH_LOW_RANK)
    second = copy.deepcopy(first)
    x = inputs(2, 100, torch.float32)
    second(x)
    assert uses_kernels(second)

    def fail(*_) -> Tensor:
        raise OSError("planned: cannot find ptxas")

    monkeypatch.setattr(BlockWeight, "product", fail)
    with pytest.warns(RuntimeWarning, match="cannot find ptxas"):
        y = first(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer in (first, second):
            torch.testing.assert_close(layer(x), x @ dense.T, rtol=1e-5, atol=1e-5)
            assert not uses_kernels(layer)
    torch.testing.assert_close(y, x @ dense.T, rtol=1e-5, atol=1e-5)


def test_a_graph_is_not_captured_before_the_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would put the codes in order again in each replay, from memory that was given back."""
    layer = QuantizedLinear.from_quantized(LloydMax(3).quantize(normal_weight((8, 32)), None), None)
    monkeypatch.setattr("quantizers.kernel_holder._is_captured", lambda levels: True)
    with pytest.raises(RuntimeError, match="Run the model once, then capture it"):
        layer._try_kernels(lambda weight: weight.product(torch.ones(1, 32)))
