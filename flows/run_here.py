"""run_here(): a deployment's flow in this process, now, with no server needed."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flows.configuration import Deployment
from flows.states import GATED

if TYPE_CHECKING:
    from prefect.states import State

DONE, FAILED, GATED_CODE = 0, 1, 3


def run_here(deployment: Deployment) -> "State[Any]":
    """The final state. Raises DeployError where PREFECT_API_URL names a server that does not answer."""
    from flows.named_server import check_server_if_named

    check_server_if_named()
    call: Callable[..., State[Any]] = deployment.flow()
    return call(**deployment.parameters, return_state=True)


def exit_code(state: "State[Any]") -> int:
    """0 where all was done or nothing was to be done, 3 where a gate refused, 1 where the run failed."""
    if state.is_completed():
        return DONE
    return GATED_CODE if state.name == GATED else FAILED
