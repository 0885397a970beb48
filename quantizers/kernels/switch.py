"""Whether kernels are used: on a CUDA device, until one fails; then never again in this process, with one warning."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found")
SHORTAGES = ("out of memory", "STATUS_ALLOC_FAILED")  # of Triton, which loads a kernel, and of NVIDIA's libraries


class KernelSwitch:
    """See the module; `KERNELS` is the process's own.

    Attributes:
        device_types: where kernels run. Triton's interpreter runs them on a CPU, too slowly for anything but tests.
        failure: why they are off, or None.
    """

    def __init__(self, device_types: tuple[str, ...] = ("cuda",)) -> None:
        self.device_types = device_types
        self.failure: str | None = None

    def serves(self, x: Tensor) -> bool:
        """May what begins with `x` be tried?"""
        dtypes = (torch.float32, torch.float16, torch.bfloat16)
        return self.failure is None and x.device.type in self.device_types and x.dtype in dtypes

    def attempt(self, run: Callable[[], Found]) -> Found | None:
        """What `run` gives, or None where Triton is missing or fails.

        Raises:
            torch.OutOfMemoryError, RuntimeError: memory ran out in `run`, which is no reason to think that kernels do
                not work.
        """
        try:
            return run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers, drivers and Triton raise all kinds
            if any(words in str(error) for words in SHORTAGES):
                raise
            self.failure = f"{type(error).__name__}: {str(error).strip() or 'without a message'}"
            warnings.warn(
                f"bitsmith's GPU kernels do not work here ({self.failure[:500]}); torch does what they would, but "
                "slowly: packed layers are dequantized for every product, and codes are searched for step by step. "
                "`pip install triton` or another version of it may help",
                RuntimeWarning,
                stacklevel=2,
            )
            return None


KERNELS = KernelSwitch()
