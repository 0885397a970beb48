"""Token embeddings and an output head that stay packed.

    QuantizedEmbedding    in place of `nn.Embedding`: decodes the rows that are looked up, and no others
    QuantizedHead         in place of a head of its own: x Q^T + bias, a run of rows dense at a time
    TiedHead              in place of a head that shares the embedding's weight
    TiedEmbedding         in place of another embedding that shares it, as encoder and decoder do

A head is the largest matrix of a model, and its product the one that is worth no dense copy: with 128,256 tokens and a
width of 8192 one would take 4 GB. Only formats whose rows can be read alone serve (rows.py). On a GPU with Triton a
product of up to 16 rows puts the codes into the kernels' layout (kernel_holder.py), from which rows are looked up, too.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor, nn

from quantizers.block_format import BlockFormat
from quantizers.kernel_holder import KernelHolder
from quantizers.kernels.abstract_weight import MOST_FUSED_ROWS
from quantizers.kernels.block_weight import BlockWeight
from quantizers.linear import autocast_dtype
from quantizers.packed_linear import is_traced, packed_linear
from quantizers.quantized import QuantizedTensor
from quantizers.rows import WEIGHTS_AT_ONCE, decode_rows, decode_runs, runs


class PackedRows(KernelHolder):
    """A matrix [rows, columns] as it is stored.

    Attributes:
        like: of no elements; its dtype is the one of what is given out, and follows the module's.
    """

    cast_buffers: ClassVar[tuple[str, ...]] = ("like",)
    format: BlockFormat
    like: Tensor

    def __init__(self, shape: tuple[int, int], form: BlockFormat, dtype: torch.dtype) -> None:
        super().__init__(shape, form)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def fill(self, quantized: QuantizedTensor) -> None:
        """Take the tensors of `quantized`."""
        self._leave_kernels()
        for name, tensor in quantized.tensors().items():
            setattr(self, name, tensor)
        self.set_levels(quantized.levels)

    @property
    def weight(self) -> Float[Tensor, "rows columns"]:
        """All of it, dequantized anew at each access; empty on the meta device until it is filled."""
        if self.levels is None:
            return torch.empty(self.shape, dtype=self.like.dtype, device="meta")
        return self.quantized().dequantize(self.like.dtype)

    def product(self, x: Float[Tensor, "... columns"]) -> Float[Tensor, "... rows"]:
        """x Q^T in the dtype of `x`, or autocast's. The gradient goes to `x`."""
        return _ProductByRuns.apply(x, self)

    def back(self, gradient: Float[Tensor, "... rows"]) -> Float[Tensor, "... columns"]:
        """The gradient of `product`'s input: `gradient` Q."""
        total = gradient.new_zeros(*gradient.shape[:-1], self.shape[1], dtype=torch.float32)
        for run, part in self.parts():
            total += gradient[..., run.start : run.stop] @ part.to(gradient.dtype)
        return total.to(gradient.dtype)

    def logits(self, x: Float[Tensor, "... columns"]) -> Float[Tensor, "... rows"]:
        """The product, as one operator under `torch.compile`."""
        return packed_linear(x, self.number, self.shape[0]) if is_traced() else self.product(x)

    def kernel_product(self, x: Float[Tensor, "... columns"]) -> Float[Tensor, "... rows"] | None:
        """The same for few rows, by kernels and without a gradient; None where they do not serve."""
        flat = x.detach().reshape(-1, self.shape[1])
        if len(flat) > MOST_FUSED_ROWS:
            return None
        y = self.by_kernels(flat, lambda weight: weight.product(flat))
        return None if y is None else y.view(*x.shape[:-1], self.shape[0])

    def rows(self, numbers: Int64[Tensor, " some"]) -> Float32[Tensor, "some columns"]:
        """These rows of Q, see `decode_rows`."""
        held = self._kernel_weight
        if not isinstance(held, BlockWeight):
            return decode_rows(self.quantized(), numbers)
        some = max(1, WEIGHTS_AT_ONCE // self.shape[1])
        return torch.cat([held.rows(each) for each in numbers.split(some)])

    def parts(self) -> Iterator[tuple[range, Float32[Tensor, "run columns"]]]:
        """All of Q, a run of rows after the other."""
        held = self._kernel_weight
        if not isinstance(held, BlockWeight):
            yield from decode_runs(self.quantized())
            return
        for run in runs(self.shape, self.format):
            yield run, held.rows(torch.arange(run.start, run.stop, device=self.levels.device))

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
        rows = self.rows(tokens.reshape(-1).long()).to(self.like.dtype)
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
        return _plus(self.logits(x), self.bias)


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
        return _plus(source.logits(x.to(source.like.device)).to(x.device), self.bias)


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
        with torch.autocast(x.device.type, enabled=False):
            found = rows.kernel_product(x)
            if found is not None:
                return found
            if rows.levels.device.type == "cpu":
                quantized = rows.quantized()
                found = rows.format.compiled_product(x, quantized.plain, rows.shape, quantized.levels)
                if found is not None:
                    return found
            y = x.new_empty(*x.shape[:-1], rows.shape[0])
            for run, part in rows.parts():
                y[..., run.start : run.stop] = x @ part.to(x.dtype).T
        return y

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.back(*gradients), None
