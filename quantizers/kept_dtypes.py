"""Packed modules move like any other, but `.to(dtype)` must not round what they store."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def kept_dtypes(module: nn.Module, *, but: tuple[str, ...] = ()) -> Iterator[None]:
    """Inside, `module` may be moved and cast; afterwards its buffers have their dtypes and bits of before.

    Args:
        but: buffers that are cast all the same.
    """
    before = {name: tensor for name, tensor in module.named_buffers() if name not in but}
    yield
    for name, tensor in before.items():
        moved = getattr(module, name)
        if moved.dtype != tensor.dtype:
            setattr(module, name, tensor.to(moved.device))
