"""A module of packed codes that a GPU's kernels read in a layout of their own (quantizers/kernels).

The first product puts the codes into that layout, which takes the place of the dense packing. Whoever asks for what is
stored (`quantized`, `state_dict`) gets it made anew, bit for bit, by a pass over the codes; moving or loading the
module goes back to the dense packing until the next product.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quantizers.format import StorageFormat
from quantizers.kernels.abstract_weight import AbstractKernelWeight
from quantizers.kernels.switch import KERNELS
from quantizers.kernels.weights import KERNEL_WEIGHTS
from quantizers.packed_linear import numbered
from quantizers.quantized import QuantizedTensor

NOT_OFFLOADED = (
    "Packed weights cannot be offloaded, and are small: load them onto one device, device_map={'': 'cuda'} or 'cpu', "
    "or spread them over several GPUs"
)


class KernelHolder(nn.Module, ABC):
    """See the module; built empty, on whatever device is current, for a loader to fill.

    Attributes:
        shape: [out, in] of the matrix.
        levels: the codebook, None until `set_levels`, as levels are stored once a checkpoint.
        number: by which `torch.compile` knows it, see packed_linear.py.
        cast_buffers: whose dtype follows the module's; all others keep theirs.
    """

    weight_packed: Tensor
    cast_buffers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shape: tuple[int, int], form: StorageFormat) -> None:
        super().__init__()
        self.shape, self.format = shape, form
        for name, (size, tensor_dtype) in form.tensor_specs(shape).items():
            self.register_buffer(name, torch.empty(size, dtype=tensor_dtype))
        self.levels: Tensor
        self.register_buffer("levels", None, persistent=False)
        self._kernel_weight: AbstractKernelWeight | None = None  # while it is there, what it replaces is None
        self.number = numbered(self)

    @abstractmethod
    def product(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """x W^T in the dtype of `x`."""

    @abstractmethod
    def back(self, gradient: Float[Tensor, "... out"]) -> Float[Tensor, "... in"]:
        """The gradient of that product's input: `gradient` W."""

    def set_levels(self, levels: Float[Tensor, " levels"]) -> None:
        """Give the module its codebook, on the device of its codes."""
        self._leave_kernels()
        self.levels = levels.to(self.weight_packed.device)

    def quantized(self) -> QuantizedTensor:
        """The matrix as a `QuantizedTensor` that shares this module's memory, but for what the kernels hold.

        Raises:
            RuntimeError: somebody has put the codes onto the meta device, as accelerate's offloading does.
        """
        stored = {name: getattr(self, name) for name in self.format.tensor_specs(self.shape)}
        if self._kernel_weight is not None:
            stored |= self._kernel_weight.stored()
        if stored["weight_packed"].is_meta and not self.levels.is_meta:
            raise RuntimeError(f"the codes of this layer are on the meta device. {NOT_OFFLOADED}")
        return QuantizedTensor.from_tensors(self.format, self.shape, self.levels, stored)

    def by_kernels(self, x: Tensor, run: Callable[[AbstractKernelWeight], Tensor]) -> Tensor | None:
        """What `run` makes of the matrix in the kernels' layout, or None where no kernel serves `x`."""
        fits = self.format.kind in KERNEL_WEIGHTS and x.device == self.levels.device and type(x) is Tensor  # not fake
        if fits and KERNELS.serves(x):
            return self._try_kernels(run)
        if KERNELS.failure is not None:
            self._leave_kernels()
        return None

    @torch.compiler.disable  # changes buffers and catches what Triton raises
    def _try_kernels(self, run: Callable[[AbstractKernelWeight], Tensor]) -> Tensor | None:
        if self._kernel_weight is None and _is_captured(self.levels):
            raise RuntimeError(
                "a CUDA graph is captured before the first product of a packed layer, which puts its codes in another "
                "order and would do so in each replay. Run the model once, then capture it"
            )
        y = KERNELS.attempt(lambda: run(self._enter_kernels()))
        if y is None:
            self._leave_kernels()
        return y

    @torch.inference_mode(False)
    def _enter_kernels(self) -> AbstractKernelWeight:
        if self._kernel_weight is None:
            quantized = self.quantized()
            weight = KERNEL_WEIGHTS[self.format.kind].from_stored(
                self.format, quantized.shape, quantized.plain, self.levels
            )
            for name in weight.replaces:
                if name in self._buffers:
                    self._buffers[name] = None
            self._kernel_weight = weight
        return self._kernel_weight

    @torch.inference_mode(False)
    def _leave_kernels(self) -> None:
        if self._kernel_weight is not None:
            self._buffers |= self._kernel_weight.stored()
            self._kernel_weight = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is a module of its own."""
        super().__setstate__(state)
        self.number = numbered(self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._kernel_weight is not None:
            destination.update({f"{prefix}{name}": tensor for name, tensor in self._kernel_weight.stored().items()})

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._leave_kernels()
        super()._load_from_state_dict(*arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KernelHolder":
        """Move like any module, but keep the stored dtypes: `.to(dtype)` would round the scales."""
        self._leave_kernels()
        before = {name: tensor for name, tensor in self.named_buffers() if name not in self.cast_buffers}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self


def _is_captured(levels: Tensor) -> bool:
    """Is what is done with them put into a CUDA graph?"""
    return levels.is_cuda and torch.cuda.is_current_stream_capturing()
