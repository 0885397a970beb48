"""What a failed step means to Prefect: whether trying again can help, and what the log shows of it.

An error that the user can mend is one paragraph, which the run's state holds; a traceback would only hide it.
"""

import logging
from typing import Any

from pipeline.errors import PipelineError, WorkerError
from registry import RegistryError
from registry.hub_client import causes, is_for_now

KNOWN = (PipelineError, RegistryError)


def is_network_failure(error: BaseException) -> bool:
    """Did a connection or a server fail, now and perhaps not in a minute?

    What the Hub refuses for good (no such model, gated, offline by choice) is none. A ModelError or
    CalibrationError is one if a network failure caused it.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    found = list(causes(error))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in found):
        return False
    for cause in found:
        if isinstance(cause, HfHubHTTPError):
            return is_for_now(cause.response.status_code)
    return any(isinstance(cause, HTTPError | ConnectionError | TimeoutError) for cause in found)


def only_network_failures(_task: Any, _task_run: Any, state: Any) -> bool:
    """Prefect's `retry_condition_fn`: a wrong recipe stays wrong however often it is tried."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and is_network_failure(error)


def only_lost_workers_and_network(_task: Any, _task_run: Any, state: Any) -> bool:
    """The same where work runs in processes that may be killed."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, WorkerError) or (isinstance(error, BaseException) and is_network_failure(error))


def keep_known_errors_short() -> None:
    """Leave out the log records that print a known error's traceback; the state's record has the message."""
    for name in ("prefect.task_runs", "prefect.flow_runs"):
        logging.getLogger(name).addFilter(_is_no_known_error)


def _is_no_known_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], KNOWN))
