"""What each stage took beside its forecast, for the tables of the command line and of a flow."""

from collections.abc import Sequence

from pipeline.budget import human_bytes
from pipeline.stages import Stage


def stage_table(stages: Sequence[Stage]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers and rows; a GPU's memory only where some stage used one."""
    headers = ("stage", "seconds", "forecast", "peak memory", "forecast")
    on_device = any(stage.device_peak_bytes or stage.forecast_device_bytes for stage in stages)
    rows = [_row(stage) + (_on_device(stage) if on_device else ()) for stage in stages]
    return headers + (("on the GPU", "forecast") if on_device else ()), rows


def _row(stage: Stage) -> tuple[str, ...]:
    seconds = stage.forecast_seconds
    expected = "already done" if stage.reused else "" if seconds is None else f"{seconds:.0f}"
    return (
        stage.name,
        f"{stage.seconds:.1f}",
        expected,
        _bytes(stage.peak_memory_bytes),
        _bytes(stage.forecast_memory_bytes),
    )


def _on_device(stage: Stage) -> tuple[str, ...]:
    return _bytes(stage.device_peak_bytes), _bytes(stage.forecast_device_bytes)


def _bytes(num_bytes: int | None) -> str:
    return human_bytes(num_bytes) if num_bytes else ""
