"""A linear layer whose weight stays packed: y = x Q^T + (x L2^T) L1^T + bias.

Q is dequantized for the length of one product, forward and again backward, and never kept (ModuLoRA,
arXiv:2309.16119); so a model costs its packed size plus one dense matrix, also while training.

On a GPU with Triton up to 16 rows are multiplied without a dense matrix, see kernel_holder.py.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quantizers.format import StorageFormat
from quantizers.kernel_holder import KernelHolder
from quantizers.kernels.abstract_weight import KernelFactors
from quantizers.packed_linear import is_traced, packed_linear
from quantizers.quantized import LowRank, QuantizedTensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of `x`; None where it is off, knows no such device, or leaves such numbers alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class _PackedMatmul(torch.autograd.Function):
    """x Q^T, saving the packed weight only; the codes get no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "QuantizedLinear") -> Tensor:
        ctx.layer = layer
        y = layer.kernel_product(x)
        if y is not None:
            return y
        dtype = autocast_dtype(x)
        if dtype is None:
            return layer.quantized().product(x)
        with torch.autocast(x.device.type, enabled=False):  # Q is decoded in float32
            return layer.quantized().product(x.to(dtype))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.quantized_back(*gradients), None


class QuantizedLinear(KernelHolder):
    """Stands in for `nn.Linear(in_features, out_features)`; its state is what format.py lists, and `bias`."""

    def __init__(self, shape: tuple[int, int], form: StorageFormat, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(shape, form)
        self.out_features, self.in_features = shape
        self.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype), requires_grad=False) if bias else None

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

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The dequantized weight, made anew at each access, for code that looks at a layer's `weight`.

        Empty on the meta device until the layer is filled: transformers "initializes" layers while loading.
        """
        if self.levels is None:
            return torch.empty(self.out_features, self.in_features, device="meta")
        quantized_part, low_rank = self.quantized_part(self.levels), self.low_rank()
        return quantized_part if low_rank is None else quantized_part + low_rank.product()

    @property
    def qweight(self) -> Tensor:
        """Something on the weight's device: PEFT asks for it by this name, 18 times a layer, and would ask `weight`."""
        return self.levels

    def low_rank(self) -> LowRank | None:
        """The low-rank part, as it is stored."""
        form = self.format
        if not form.rank:
            return None
        tensors = {name: getattr(self, name) for name in form.factors.tensor_specs(self.shape, form.rank)}
        return LowRank(tensors, form.factor_bits, form.rank, self.shape)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """The product in the dtype of `x`, or of autocast."""
        y = packed_linear(x, self.number, self.out_features) if is_traced() else self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """x (Q + L1 L2)^T in the dtype of `x`."""
        low_rank = self.low_rank()
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        y = None if needs_gradient or low_rank is None else self.kernel_product(x, low_rank)
        if y is None:
            y = self.quantized_product(x)
            if low_rank is not None:
                factors = low_rank.factors()
                low = nn.functional.linear(x, factors.into.to(x.dtype))
                y = y + nn.functional.linear(low, factors.out.to(x.dtype))
        return y

    def quantized_product(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """x Q^T alone, in the dtype of `x`: no low-rank part, no bias. The gradient goes to `x`."""
        return _PackedMatmul.apply(x, self)

    def quantized_back(self, gradient: Float[Tensor, "... out"]) -> Float[Tensor, "... in"]:
        """The gradient of `quantized_product`'s input: `gradient` Q."""
        flat = gradient.reshape(-1, self.out_features)
        back = self.by_kernels(flat, lambda weight: weight.back(flat))
        if back is None:
            return self.quantized().product(gradient, transposed=True)
        return back.view(*gradient.shape[:-1], self.in_features)

    def back(self, gradient: Float[Tensor, "... out"]) -> Float[Tensor, "... in"]:
        """The gradient of `product`'s input: `gradient` (Q + L1 L2)."""
        low_rank = self.low_rank()
        back = self.quantized_back(gradient)
        if low_rank is None:
            return back
        factors = low_rank.factors()
        return back + (gradient @ factors.out.to(gradient.dtype)) @ factors.into.to(gradient.dtype)

    def kernel_product(
        self, x: Float[Tensor, "... in"], low_rank: LowRank | None = None
    ) -> Float[Tensor, "... out"] | None:
        """x Q^T, with `low_rank` added, by kernels and without a gradient; None where they do not serve."""
        if x.shape[-1] != self.in_features or not KernelFactors.fits(low_rank):
            return None
        dtype = autocast_dtype(x)
        if dtype is not None:
            with torch.autocast(x.device.type, enabled=False):
                return self.kernel_product(x.to(dtype), low_rank)
        flat = x.detach().reshape(-1, self.in_features)
        factors = None if low_rank is None else KernelFactors(low_rank)
        y = self.by_kernels(flat, lambda weight: weight.product(flat, factors))
        return None if y is None else y.view(*x.shape[:-1], self.out_features)

    def quantized_part(self, like: Tensor) -> Float[Tensor, "out in"]:
        """Q in the dtype of `like`, a tensor that will be multiplied with it."""
        dense = self.kernel_part(like)
        return self.quantized().quantized_part().to(like.dtype) if dense is None else dense

    def kernel_part(self, like: Tensor) -> Float[Tensor, "out in"] | None:
        """The same by kernels; None where they do not serve."""
        return self.by_kernels(like, lambda weight: weight.dense(like.dtype))

    def extra_repr(self) -> str:
        """Shown in the module's repr."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format.label}"
