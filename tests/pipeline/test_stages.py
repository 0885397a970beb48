import sys

import numpy as np
import pytest
import torch

from pipeline.errors import MemoryShortError
from pipeline.forecast import StageForecast
from pipeline.stage_table import stage_table
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


def test_what_a_gpu_took_stands_beside_its_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that the process uses the one of which it took more, since the stage began."""
    taken = {0: 5 * 10**9, 1: 7 * 10**9}
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("torch.cuda.max_memory_reserved", taken.__getitem__)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: taken.update({device: 10**9}))
    log = StageLog()
    log.forecasts = (StageForecast("costs", 1.0, 2 * 10**9, 2 * 10**9, device_bytes=3 * 10**9),)
    with log.stage("costs"):
        taken[1] = 4 * 10**9
    (costs,) = log.stages
    assert (costs.device_peak_bytes, costs.forecast_device_bytes) == (4 * 10**9, 3 * 10**9)
    headers, ((*_, peak, forecast),) = stage_table(log.stages)
    assert headers[-2:] == ("on the GPU", "forecast")
    assert (peak, forecast) == ("4.00 GB", "3.00 GB")


def test_what_a_worker_took_counts_where_it_is_more() -> None:
    log = StageLog()
    for _ in range(2):  # the second begins anew
        with log.stage("costs"):
            log.worker_took(10**15, 5)
            log.worker_took(10**14, 7)
    assert [(stage.peak_memory_bytes, stage.device_peak_bytes) for stage in log.stages] == [(10**15, 7)] * 2


def test_without_a_gpu_the_table_has_no_columns_for_it() -> None:
    log = StageLog()
    with log.stage("plan"):
        log.reused()
    headers, (row,) = stage_table(log.stages)
    assert headers == ("stage", "seconds", "forecast", "peak memory", "forecast")
    assert row[0] == "plan"
    assert row[2] == "already done"


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
