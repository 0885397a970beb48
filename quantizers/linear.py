"""A linear layer whose weight stays packed: y = x Q^T + (x L2^T) L1^T + bias.

Q is dequantized for the length of one product, forward and again backward, and never kept (ModuLoRA,
arXiv:2309.16119); so a model costs its packed size plus one dense matrix, also while training.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quantizers.format import StorageFormat
from quantizers.quantized import QuantizedTensor


class _PackedMatmul(torch.autograd.Function):
    """x Q^T, saving the packed weight only; the codes get no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "QuantizedLinear") -> Tensor:
        ctx.layer = layer
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):  # Q is decoded in float32
            return layer.quantized().product(x.to(dtype))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return ctx.layer.quantized().product(gradient, transposed=True), None


class QuantizedLinear(nn.Module):
    """Stands in for `nn.Linear(in_features, out_features)`; its state is what format.py lists, and `bias`.

    Built empty, on whatever device is current, for a loader to fill; `levels` is set by `set_levels`, as
    the levels are stored once a checkpoint.
    """

    weight_packed: Tensor

    def __init__(self, shape: tuple[int, int], form: StorageFormat, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.format = form
        for name, (size, tensor_dtype) in form.tensor_specs(shape).items():
            self.register_buffer(name, torch.empty(size, dtype=tensor_dtype))
        self.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype), requires_grad=False) if bias else None
        self.levels: Tensor
        self.register_buffer("levels", None, persistent=False)

    @staticmethod
    def from_quantized(quantized: QuantizedTensor, bias: Float[Tensor, " out"] | None) -> "QuantizedLinear":
        """A filled layer."""
        dtype = torch.float32 if bias is None else bias.dtype
        layer = QuantizedLinear(quantized.shape, quantized.format, bias=bias is not None, dtype=dtype)
        for name, tensor in quantized.tensors().items():
            setattr(layer, name, tensor)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer.set_levels(quantized.levels)
        return layer

    def set_levels(self, levels: Float[Tensor, " levels"]) -> None:
        """Give the layer its codebook, on the device of its codes."""
        self.levels = levels.to(self.weight_packed.device)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The dequantized weight, made anew at each access, for code that looks at a layer's `weight`.

        Empty on the meta device until the layer is filled: transformers "initializes" layers while loading.
        """
        if self.levels is None:
            return torch.empty(self.out_features, self.in_features, device="meta")
        return self.quantized().dequantize()

    def quantized(self) -> QuantizedTensor:
        """The weight as a `QuantizedTensor` that shares this layer's memory."""
        shape = (self.out_features, self.in_features)
        stored = {name: getattr(self, name) for name in self.format.tensor_specs(shape)}
        return QuantizedTensor.from_tensors(self.format, shape, self.levels, stored)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """The product in the dtype of `x`."""
        y = self.quantized_product(x)
        low_rank = self.quantized().low_rank
        if low_rank is not None:
            factors = low_rank.factors()
            low = nn.functional.linear(x, factors.into.to(x.dtype))
            y = y + nn.functional.linear(low, factors.out.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def quantized_product(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """x Q^T alone, in the dtype of `x`: no low-rank part, no bias. The gradient goes to `x`."""
        return _PackedMatmul.apply(x, self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Move like any module, but keep the stored dtypes: `.to(dtype)` would round the scales."""
        before = {name: tensor for name, tensor in self.named_buffers() if tensor is not None}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self

    def extra_repr(self) -> str:
        """Shown in the module's repr."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format.label}"
