"""Late runs become one also where `serve` takes them: Prefect's runner starts one only when it has room for it, so that
runs that were missed while nothing ran would follow one another, and never meet the deployment's limit.
"""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled

MESSAGE = "Late: a newer run of this deployment does the same."
AT_ONCE = 200  # runs that the server lists in one answer


def collapse_late_runs(client: SyncPrefectClient, deployments: Iterable[RunnerDeployment]) -> int:
    """Of the schedules' runs whose time is past, cancel all but the last with the same parameters.

    Only of deployments that cancel a run rather than let it wait; what people asked for is left alone.

    Returns:
        How many were cancelled.
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
        newer: list[dict[str, Any]] = []
        for run in list(_late(client, known.id)):
            if run.auto_scheduled and run.parameters in newer:
                client.set_flow_run_state(run.id, Cancelled(message=MESSAGE), force=True)
                cancelled += 1
            newer.append(run.parameters)
    return cancelled


def _late(client: SyncPrefectClient, deployment_id: UUID) -> Iterator[FlowRun]:
    """The newest first."""
    late = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        expected_start_time=FlowRunFilterExpectedStartTime.model_validate({"before_": datetime.now(UTC)}),
    )
    newest_first, offset = FlowRunSort.EXPECTED_START_TIME_DESC, 0
    while found := client.read_flow_runs(flow_run_filter=late, sort=newest_first, limit=AT_ONCE, offset=offset):
        yield from found
        offset += len(found)
