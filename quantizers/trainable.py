"""A packed layer in training: y = gain * x Q^T + (x L2^T) L1^T + bias, with Q frozen, and L1, L2 as float32 parameters.

Factors and bias have the names of what is stored, so `network.named_parameters()` speaks of the checkpoint's tensors
while such layers stand in for the packed ones. The gain, 1 at the start, belongs to the stored scales, since Q is
proportional to them; with it dL/dgain = sum(dL/dy * x Q^T) needs no dense gradient. Autograd keeps x [tokens, in],
x L2^T [tokens, rank] and, where the gain is trained, x Q^T [tokens, out] a layer, and no weight (INT2.1 calls it EMEF,
arXiv:2306.08162; ModuLoRA, arXiv:2309.16119).
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from quantizers.factors import quantize_factors
from quantizers.linear import QuantizedLinear
from quantizers.quantized import LowRank, QuantizedTensor
from solvers.low_rank import Factors

SCALES = ("weight_scale", "weight_scale_step", "weight_scale_offset")  # Q is proportional to all that a format has


class TrainableLinear(nn.Module):
    """Stands in for `layer`, which it reads and never writes.

    Args:
        layer: filled.
    """

    low_rank_out: nn.Parameter | None
    low_rank_in: nn.Parameter | None

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.layer = layer
        self.bias = layer.bias
        quantized = layer.quantized()
        factors = None if quantized.low_rank is None else quantized.low_rank.factors()
        self.low_rank_out = None if factors is None else nn.Parameter(factors.out.clone())
        self.low_rank_in = None if factors is None else nn.Parameter(factors.into.contiguous().clone())
        has_scales = any(name in SCALES for name in quantized.plain)
        self.weight_gain = nn.Parameter(torch.ones(1, device=layer.levels.device)) if has_scales else None
        self.dense: Tensor | None
        self.register_buffer("dense", None, persistent=False)

    def keep_dense(self, dtype: torch.dtype) -> None:
        """Keep Q dense in the dtype in which products are made, instead of dequantizing it for each of them.

        That takes out * in * itemsize bytes for as long as this layer lives, or until `dense` is None again.
        """
        self.dense = self.layer.quantized().quantized_part().to(dtype)

    @property
    def weight(self) -> Float32[Tensor, "out in"]:
        """Shape and dtype alone, on the meta device: T5 asks its layers for them."""
        return torch.empty(self.layer.out_features, self.layer.in_features, device="meta")

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """The product, in the dtype of `x` or of autocast."""
        y = self.layer.quantized_product(x) if self.dense is None else nn.functional.linear(x, self.dense)
        if self.weight_gain is not None and self.weight_gain.requires_grad:
            y = _Gained.apply(y, self.weight_gain)
        if self.low_rank_out is not None and self.low_rank_in is not None:
            low = nn.functional.linear(x, self.low_rank_in.to(x.dtype))
            y = y + nn.functional.linear(low, self.low_rank_out.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Gained(torch.autograd.Function):
    """y * gain in the dtype of y. bfloat16 knows no number between 1 and 1.008, so gain - 1 is what is rounded."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor) -> Tensor:
        more = (gain.detach() - 1).to(y.dtype)
        ctx.save_for_backward(y, more)
        return torch.addcmul(y, y, more)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        y, more = ctx.saved_tensors
        return torch.addcmul(upstream, upstream, more), (upstream * y).sum(dtype=torch.float32).view(1)


def with_trained(
    quantized: QuantizedTensor, *, gain: Float32[Tensor, " 1"] | None = None, factors: Factors | None = None
) -> QuantizedTensor:
    """The same codes with the scales times `gain` and `factors` in place of the old, where they are given.

    Args:
        factors: on the device of `quantized`, rounded here into as many bits as it stores.
    Raises:
        ValueError: a factor has a NaN or an infinity.
    """
    if gain is not None:
        scaled = {name: tensor * gain for name, tensor in quantized.plain.items() if name in SCALES}
        quantized = replace(quantized, plain=quantized.plain | scaled)
    if factors is None:
        return quantized
    form = quantized.format
    stored = quantize_factors(factors, form.factors)
    return quantized.with_low_rank(LowRank(stored, form.factor_bits, form.rank, quantized.shape))
