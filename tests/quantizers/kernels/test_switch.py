"""The first failure turns the kernels off, with one warning that says why."""

import warnings

import pytest
import torch

from quantizers.kernels.switch import KernelSwitch


def fail(error: Exception):
    def run() -> torch.Tensor:
        raise error

    return run


def test_the_first_failure_is_told_and_the_last() -> None:
    switch = KernelSwitch(("cpu",))
    x = torch.ones(2)
    assert switch.serves(x)
    assert switch.attempt(lambda: x) is x
    with pytest.warns(RuntimeWarning, match=r"RuntimeError: no C compiler.*torch does what they would"):
        assert switch.attempt(fail(RuntimeError("no C compiler"))) is None
    assert not switch.serves(x)
    assert switch.failure == "RuntimeError: no C compiler"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("20 MiB are missing"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_is_the_callers(error: Exception) -> None:
    switch = KernelSwitch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(type(error)):
            switch.attempt(fail(error))
    assert switch.failure is None


def test_only_a_gpu_and_three_dtypes_are_served() -> None:
    assert not KernelSwitch().serves(torch.ones(1))
    switch = KernelSwitch(("cpu",))
    served = [torch.float32, torch.float16, torch.bfloat16]
    for dtype in [*served, torch.float64, torch.int32, torch.complex64]:
        assert switch.serves(torch.ones(1, dtype=dtype)) == (dtype in served)
