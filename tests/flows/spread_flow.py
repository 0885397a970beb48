"""A flow that does nothing but spread one task over the matrices; in a module, for Dask and Ray send it by its name."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow

from pipeline.decompose import QuantizeMatrix
from pipeline.model import Model, open_model
from pipeline.spread import Spread

LABEL = "lloyd3-g32-s4"
_current: dict[str, tuple[Spread, QuantizeMatrix, Model, Callable[[int], None]]] = {}


def quantized(
    folder: Path, model_dir: Path, spread: Spread, on_result: Callable[[int], None] = lambda number: None
) -> dict[str, bytes]:
    """File name -> content of all matrices, by `spread`; `on_result` is told after each how many were before."""
    folder.mkdir(exist_ok=True)
    model = open_model(str(model_dir))
    task = QuantizeMatrix(model, {matrix.module: LABEL for matrix in model.matrices}, None, folder)
    _current["work"] = (spread, task, model, on_result)
    _quantize()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def die_at_second_matrix(batch: Any, say: Callable[[str], None]) -> None:
    """In the place of flows.spread.measured_batch: what the system does where memory runs out."""
    for name in batch["names"][:2]:
        say(f"decompose, matrix {name}")
    os.kill(os.getpid(), signal.SIGKILL)


@flow(name="quantize", persist_result=False)
def _quantize() -> None:
    _spread_current()  # by its name: what the flow's function names itself would be sent to the workers


def _spread_current() -> None:
    spread, task, model, on_result = _current["work"]
    for number, _ in enumerate(spread(task, model.matrices)):
        on_result(number)
