import numpy as np

from pipeline.stages import StageLog


def test_a_stage_knows_its_own_peak() -> None:
    log = StageLog()
    with log.stage("large"):
        block = np.ones(64 * 2**20, dtype=np.uint8)
        del block
    with log.stage("small"):
        log.reused()
    large, small = log.stages
    assert (large.name, small.name) == ("large", "small")
    assert small.reused
    assert not large.reused
    assert large.seconds >= 0
    assert large.peak_memory_bytes > 64 * 2**20
    assert small.peak_memory_bytes <= large.peak_memory_bytes
