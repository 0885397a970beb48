"""At which of several budgets a run failed."""

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import PipelineError
from registry import RegistryError


@contextmanager
def named_failure(budget: str, num_finished: int, num_budgets: int) -> Iterator[None]:
    """Say at which budget a known error happened.

    Raises:
        PipelineError: instead of the error, which is its cause.
    """
    try:
        yield
    except (PipelineError, RegistryError) as error:
        raise PipelineError(
            f"The budget {budget} failed, with {num_finished} of {num_budgets} finished: {error}"
        ) from error
