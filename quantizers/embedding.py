"""Token embeddings and an output head that stay packed.

    QuantizedEmbedding    in place of `nn.Embedding`: decodes the rows that are looked up, and no others
    QuantizedHead         in place of a head of its own: x Q^T + bias, a run of rows dense at a time
    TiedHead              in place of a head that shares the embedding's weight
    TiedEmbedding         in place of another embedding that shares it, as encoder and decoder do

A head is the largest matrix of a model, and its product the one that is worth no dense copy: with 128,256 tokens and a
width of 8192 one would take 4 GB. Only formats whose rows can be read alone serve (rows.py).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from quantizers.block_format import BlockFormat
from quantizers.kept_dtypes import kept_dtypes
from quantizers.linear import autocast_dtype
from quantizers.quantized import QuantizedTensor
from quantizers.rows import decode_rows, decode_runs


class PackedRows(nn.Module):
    """A matrix [rows, columns] as it is stored; built empty for a loader to fill, see QuantizedLinear.

    Attributes:
        like: of no elements; its dtype is the one of what is given out, and follows the module's.
    """

    weight_packed: Tensor
    like: Tensor

    def __init__(self, shape: tuple[int, int], form: BlockFormat, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.format = shape, form
        for name, (size, tensor_dtype) in form.tensor_specs(shape).items():
            self.register_buffer(name, torch.empty(size, dtype=tensor_dtype))
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.levels: Tensor
        self.register_buffer("levels", None, persistent=False)

    def fill(self, quantized: QuantizedTensor) -> None:
        """Take the tensors of `quantized`."""
        for name, tensor in quantized.tensors().items():
            setattr(self, name, tensor)
        self.set_levels(quantized.levels)

    def set_levels(self, levels: Float[Tensor, " levels"]) -> None:
        """Give it its codebook, on the device of its codes."""
        self.levels = levels.to(self.weight_packed.device)

    def quantized(self) -> QuantizedTensor:
        """The matrix, sharing this module's memory."""
        stored = {name: getattr(self, name) for name in self.format.tensor_specs(self.shape)}
        return QuantizedTensor.from_tensors(self.format, self.shape, self.levels, stored)

    @property
    def weight(self) -> Float[Tensor, "rows columns"]:
        """All of it, dequantized anew at each access; empty on the meta device until it is filled."""
        if self.levels is None:
            return torch.empty(self.shape, dtype=self.like.dtype, device="meta")
        return self.quantized().dequantize(self.like.dtype)

    def product(self, x: Float[Tensor, "... columns"]) -> Float[Tensor, "... rows"]:
        """x Q^T in the dtype of `x`, or autocast's. The gradient goes to `x`."""
        return _ProductByRuns.apply(x, self)

    def _apply(self, fn, recurse: bool = True) -> "PackedRows":
        """Move like any module, but keep the stored dtypes: `.to(dtype)` would round the scales."""
        with kept_dtypes(self, but=("like",)):
            super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """Shown in the module's repr."""
        return f"{self.shape[0]}, {self.shape[1]}, {self.format.label}"


class QuantizedEmbedding(PackedRows):
    """Stands in for an embedding of tokens.

    Attributes:
        scale: that the rows are multiplied with, as some architectures do inside of their embedding.
        scale_is_rounded: to the rows' dtype first.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        form: BlockFormat,
        dtype: torch.dtype,
        scale: float = 1.0,
        *,
        scale_is_rounded: bool = False,
    ) -> None:
        super().__init__(shape, form, dtype)
        self.num_embeddings, self.embedding_dim = shape
        self.scale, self.scale_is_rounded = scale, scale_is_rounded

    def forward(self, tokens: Int[Tensor, "..."]) -> Float[Tensor, "... columns"]:
        """The rows of `tokens`.

        Raises:
            IndexError: one is not in the vocabulary, see `decode_rows`.
        """
        rows = decode_rows(self.quantized(), tokens.reshape(-1).long()).to(self.like.dtype)
        if self.scale != 1:
            scale = torch.tensor(self.scale, dtype=rows.dtype if self.scale_is_rounded else torch.float64)
            rows = rows * scale.item()
        return rows.view(*tokens.shape, self.embedding_dim)


class QuantizedHead(PackedRows):
    """Stands in for an output head, `nn.Linear(columns, rows)`."""

    def __init__(self, shape: tuple[int, int], form: BlockFormat, dtype: torch.dtype, *, bias: bool) -> None:
        super().__init__(shape, form, dtype)
        self.out_features, self.in_features = shape
        self.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Float[Tensor, "... columns"]) -> Float[Tensor, "... rows"]:
        """The logits."""
        return _plus(self.product(x), self.bias)


class TiedHead(nn.Module):
    """A head without a weight of its own: it reads the embedding's, wherever that has been moved."""

    def __init__(self, source: QuantizedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = source.shape
        self._source = (source,)  # in a tuple, so that it is no submodule, which would be stored twice
        self.bias = bias

    @property
    def weight(self) -> Float[Tensor, "rows columns"]:
        """See PackedRows."""
        return self._source[0].weight

    def forward(self, x: Float[Tensor, "... columns"]) -> Float[Tensor, "... rows"]:
        """The logits, on the device of `x`, wherever the embedding is."""
        source = self._source[0]
        return _plus(source.product(x.to(source.like.device)).to(x.device), self.bias)


class TiedEmbedding(nn.Module):
    """An embedding without a weight of its own, see TiedHead."""

    def __init__(self, source: QuantizedEmbedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = source.shape
        self._source = (source,)

    @property
    def weight(self) -> Float[Tensor, "rows columns"]:
        """See PackedRows."""
        return self._source[0].weight

    def forward(self, tokens: Int[Tensor, "..."]) -> Float[Tensor, "... columns"]:
        """See QuantizedEmbedding; on the device of `tokens`."""
        source = self._source[0]
        return source(tokens.to(source.like.device)).to(tokens.device)


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)


class _ProductByRuns(torch.autograd.Function):
    """x Q^T, saving nothing dense; the codes get no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: PackedRows) -> Tensor:
        ctx.rows = rows
        x = x.to(autocast_dtype(x) or x.dtype)
        quantized = rows.quantized()
        found = rows.format.compiled_product(x, quantized.plain, rows.shape, quantized.levels)
        if found is not None:
            return found
        y = x.new_empty(*x.shape[:-1], rows.shape[0])
        with torch.autocast(x.device.type, enabled=False):
            for run, part in decode_runs(quantized):
                y[..., run.start : run.stop] = x @ part.to(x.dtype).T
        return y

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        total = gradient.new_zeros(*gradient.shape[:-1], ctx.rows.shape[1], dtype=torch.float32)
        for run, part in decode_runs(ctx.rows.quantized()):
            total += gradient[..., run.start : run.stop] @ part.to(gradient.dtype)
        return total.to(gradient.dtype), None
