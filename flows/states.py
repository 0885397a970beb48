"""How a run that did nothing, and one whose result was refused, are told from others: by the state's name."""

from typing import Any

from prefect.states import Completed, Failed, State

SKIPPED, GATED = "Skipped", "Gated"


def skipped(reason: str) -> State[Any]:
    """Nothing was to be done."""
    return Completed(name=SKIPPED, message=reason)


def gated(refusals: list[str]) -> State[Any]:
    """All was done, and a gate let not all of it pass; the figures stand in the refusals."""
    return Failed(name=GATED, message=" ".join(refusals))


def failed(failures: list[str], num: int) -> State[Any]:
    """Some parts of a run failed, after all were tried."""
    return Failed(message=f"{len(failures)} of {num} failed. {' '.join(failures)}")
