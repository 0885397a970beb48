"""A packed layer in training: y = x Q^T + (x L2^T) L1^T + bias, with Q frozen and L1, L2 as float32 parameters.

The parameters have the names of what is stored, so `network.named_parameters()` speaks of the checkpoint's tensors
while such layers stand in for the packed ones. Autograd keeps x [tokens, in] and x L2^T [tokens, rank] a layer and
no weight (INT2.1 calls it EMEF, arXiv:2306.08162; ModuLoRA, arXiv:2309.16119).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quantizers.linear import QuantizedLinear


class TrainableLinear(nn.Module):
    """Stands in for `layer`, which it reads and never writes.

    Args:
        layer: filled.
        dense_dtype: keep Q dense in this dtype, the one in which the products are made, instead of dequantizing it
            for every product: out * in * itemsize bytes for as long as this layer lives. None keeps it packed.
    """

    low_rank_out: nn.Parameter | None
    low_rank_in: nn.Parameter | None

    def __init__(self, layer: QuantizedLinear, dense_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.bias = layer.bias
        quantized = layer.quantized()
        factors = None if quantized.low_rank is None else quantized.low_rank.factors()
        self.low_rank_out = None if factors is None else nn.Parameter(factors.out.clone())
        self.low_rank_in = None if factors is None else nn.Parameter(factors.into.contiguous().clone())
        dense = None if dense_dtype is None else quantized.quantized_part().to(dense_dtype)
        self.dense: Tensor | None
        self.register_buffer("dense", dense, persistent=False)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """The product, in the dtype of `x` or of autocast."""
        y = self.layer.quantized_product(x) if self.dense is None else nn.functional.linear(x, self.dense)
        if self.low_rank_out is not None and self.low_rank_in is not None:
            low = nn.functional.linear(x, self.low_rank_in.to(x.dtype))
            y = y + nn.functional.linear(low, self.low_rank_out.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)
