"""Late runs become one also where `serve` takes them: Prefect's runner starts one only when it has room for it, so that
runs that were missed while nothing ran would follow one another, and never meet the deployment's limit.
"""

from collections.abc import Iterable
from datetime import UTC, datetime

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled

MESSAGE = "Late: a newer run of this deployment does the same."
AT_ONCE = 200  # runs that the server lists in one answer


def collapse_late_runs(client: SyncPrefectClient, deployments: Iterable[RunnerDeployment]) -> int:
    """Cancel all runs whose time is past but the last of each deployment that cancels rather than waits.

    Returns:
        How many.
    """
    cancelled = 0
    for deployment in deployments:
        options = deployment.concurrency_options
        if options is None or options.collision_strategy != ConcurrencyLimitStrategy.CANCEL_NEW:
            continue
        try:
            known = client.read_deployment_by_name(f"{deployment.flow_name}/{deployment.name}")
        except ObjectNotFound:
            continue
        late = FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[known.id]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
            expected_start_time=FlowRunFilterExpectedStartTime.model_validate({"before_": datetime.now(UTC)}),
        )
        newest_first = FlowRunSort.EXPECTED_START_TIME_DESC
        while runs := client.read_flow_runs(flow_run_filter=late, sort=newest_first, limit=AT_ONCE)[1:]:
            for run in runs:
                client.set_flow_run_state(run.id, Cancelled(message=MESSAGE), force=True)
            cancelled += len(runs)
    return cancelled
