"""A device that computes on the CPU and refuses what a GPU refuses, for tests where there is none.

Its tensors hold another one, on which every operation is done. An operation on tensors here and there is an error, as
is numpy's look at one that is there. `install` is for a process of its own: torch is another one after it.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FAR = "far"
_COPY, _COPY_INTO = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
WAITED_FOR: list[str] = []  # what was asked of the device, for which this machine waits until it is computed
_OF_UNKNOWN_SIZE = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "repeat_interleave",
}
_INDEX, _INDEX_PUT = torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default
_NUMBER_OF = torch.ops.aten._local_scalar_dense.default


class FarTensor(Tensor):
    """See the module's docstring.

    Attributes:
        held: on the CPU.
    """

    @staticmethod
    def __new__(cls, held: Tensor) -> "FarTensor":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(FAR, 0),
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:  # made of operations one of which changes a shape in place, of `held` alone
            return _run(func, args, kwargs or {})
        if func is Tensor.tolist:
            WAITED_FOR.append("tolist")
            return args[0].held.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Also what is made there from nothing comes by `_run`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def install() -> TorchDispatchMode:
    """Make the device; it is there within the mode that is returned."""
    import quantizers.hadamard

    torch.utils.backend_registration._setup_privateuseone_for_python_backend(FAR)  # type: ignore[attr-defined]
    make = torch.tensor

    def tensor(data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        made = make(data, dtype=dtype, device="cpu")
        return made if device is None else made.to(device)

    torch.tensor = tensor  # torch hides its own copy to the device from any mode
    quantizers.hadamard._disable_current_modes = nullcontext  # type: ignore[assignment]
    return _Factories()


def _held(argument: Any) -> Any:
    return argument.held if isinstance(argument, FarTensor) else argument


def _waits(func: Any, args: Any) -> bool:
    """Does what it gives, or how much of it, depend on numbers that must be known here?"""
    if func in (_INDEX, _INDEX_PUT):
        return any(isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1])
    return func is _NUMBER_OF or getattr(func, "_opname", "") in _OF_UNKNOWN_SIZE


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    far = [each for each in tensors if isinstance(each, FarTensor)]
    device = kwargs.get("device")
    plain = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
    near = [each for each in tensors if not isinstance(each, FarTensor) and each.dim()]
    if far and near and func is not _COPY_INTO:
        raise RuntimeError(f"{func}: {len(near)} tensors on the CPU among {len(tensors)}")
    found = func(*tree_map(_held, args), **tree_map(_held, plain))
    if func is _COPY_INTO:
        return args[0]
    is_there = bool(far) if device is None else torch.device(device).type == FAR
    if far and (_waits(func, args) or not is_there):
        WAITED_FOR.append(str(func))
    if not is_there or func is _NUMBER_OF:
        return found
    own = {id(each.held): each for each in far}  # of an operation in place
    return tree_map(lambda each: own.get(id(each), FarTensor(each)) if isinstance(each, Tensor) else each, found)
