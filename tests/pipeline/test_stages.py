import sys

import numpy as np
import pytest
import torch

from pipeline.errors import MemoryShortError
from pipeline.stages import StageLog


def test_a_stage_knows_its_own_peak() -> None:
    log = StageLog()
    with log.stage("idle"):
        pass
    with log.stage("large"):
        block = np.ones(256 * 2**20, dtype=np.uint8)
        del block
    with log.stage("small"):
        log.reused()
    idle, large, small = log.stages
    assert [stage.name for stage in log.stages] == ["idle", "large", "small"]
    assert [stage.reused for stage in log.stages] == [False, False, True]
    assert large.peak_memory_bytes > idle.peak_memory_bytes + 128 * 2**20
    if sys.platform == "linux":  # elsewhere a process does not forget its peak
        assert small.peak_memory_bytes < large.peak_memory_bytes - 128 * 2**20


def an_exabyte() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def on_a_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation.")


@pytest.mark.parametrize("take", [an_exabyte, on_a_device, lambda: bytearray(2**60)], ids=["cpu", "device", "python"])
def test_a_stage_that_runs_out_of_memory_is_named(take) -> None:
    log = StageLog()
    with (
        pytest.raises(MemoryShortError, match=r"The stage costs ran out of memory .*--device cpu") as caught,
        log.stage("costs"),
    ):
        take()
    assert "\n" not in str(caught.value)
    assert log.stages == []


def test_other_errors_of_a_stage_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^something else$"), StageLog().stage("costs"):
        raise RuntimeError("something else")
