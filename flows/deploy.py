"""deploy(): the configuration's deployments on a server, with what they need there: pools, automations, the webhook."""

import copy
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import DeploymentApplyError, RunnerDeployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.workers.process import ProcessWorker

from flows import RUN_SETTINGS
from flows.automations import make_automations
from flows.configuration import CPU_POOL, GPU_POOL, Deployment
from flows.errors import DeployError
from flows.job import registry_folder
from flows.named_server import check_server
from flows.notify import VARIABLE
from flows.schedules import prefect_schedule
from flows.version import TAG, version_tag
from pipeline.version import VERSION
from registry import Registry, RegistryError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Deployed:
    """What the server has now."""

    deployments: list[RunnerDeployment]
    automations: list[str]


def deploy(deployments: "Sequence[Deployment]") -> Deployed:
    """Make the deployments, or bring them up to date; all stay as they are if one is seen to be wrong here.

    Raises:
        DeployError: no server, or no database behind it, or one that refuses us; a work pool that is not there; a
            registry on this machine whose database does not answer; a deployment that the server refuses, which those
            before it outlive.
    """
    check_server()
    check_registries(deployments)
    try:
        with get_client(sync_client=True) as client:
            check_pools(client, deployments)
            for pool in (CPU_POOL, GPU_POOL):
                make_pool(client, pool)
        automations = make_automations(os.environ.get(VARIABLE))
    except PrefectHTTPStatusError as error:
        raise DeployError(
            f"The server refuses to make work pools or automations ({_reason(error)}). Ask whoever runs it, then run "
            "the same command again."
        ) from error
    made = [runner_deployment(deployment) for deployment in deployments]
    for number, deployment in enumerate(deployments):
        try:
            made[number].apply(work_pool_name=deployment.work_pool.name)
        except (DeploymentApplyError, PrefectHTTPStatusError) as error:
            done, left = ([each.name for each in made[part]] for part in (slice(number), slice(number, None)))
            raise DeployError(
                f"Deployment {deployment.name}: the server refuses it ({_reason(error)}). Mend it in the file, and "
                f"deploy again. Made, or brought up to date, before it: {', '.join(done) or 'none'}; as they were: "
                f"{', '.join(left)}."
            ) from error
    return Deployed(made, automations)


def runner_deployment(deployment: Deployment) -> RunnerDeployment:
    """Prefect's object for one entry, without a work pool."""
    limit = deployment.limit
    made = RunnerDeployment.from_entrypoint(
        deployment.entrypoint,
        deployment.name,
        description=deployment.description,
        version=deployment.version or VERSION,
        tags=list(dict.fromkeys([*deployment.tags, TAG, version_tag()])),
        parameters=deployment.parameters,
        paused=deployment.paused,
        schedules=[
            DeploymentScheduleCreate(
                schedule=prefect_schedule(deployment.name, each),
                active=each.active,
                parameters=each.parameters,
                slug=each.slug,
            )
            for each in deployment.all_schedules
        ],
        concurrency_limit=ConcurrencyLimitConfig(
            limit=limit.limit,
            collision_strategy=ConcurrencyLimitStrategy(limit.collision_strategy),
            grace_period_seconds=limit.grace_period_seconds,
        ),
        enforce_parameter_schema=deployment.enforce_parameter_schema,
        work_queue_name=deployment.work_pool.work_queue_name,
        job_variables=_with_settings(deployment.work_pool.job_variables.model_dump(exclude_unset=True)),
    )
    made._path = None  # the package is installed where it runs; no folder of this machine is meant
    return made


def check_pools(client: SyncPrefectClient, deployments: "Sequence[Deployment]") -> None:
    """Raise DeployError for a work pool that neither is ours nor exists."""
    known = {CPU_POOL, GPU_POOL, *(pool.name for pool in client.read_work_pools(limit=200))}
    for deployment in deployments:
        if deployment.work_pool.name not in known:
            raise DeployError(
                f"Deployment {deployment.name}: the server has no work pool {deployment.work_pool.name!r}. There are "
                f"{', '.join(sorted(known))}; `prefect work-pool create` makes another one."
            )


def check_registries(deployments: "Sequence[Deployment]") -> None:
    """Raise DeployError where the registry of a deployment is on this machine and cannot be read."""
    for deployment in deployments:
        root = registry_folder(deployment.parameters.get("registry"))
        if not root.is_dir():  # made by the first run, or another machine's
            continue
        try:
            Registry(root, read_only=True).versions()
        except RegistryError as error:
            raise DeployError(f"Deployment {deployment.name}, registry {root}: {error}") from error


def make_pool(client: SyncPrefectClient, name: str) -> None:
    """A pool for processes of workers, whose runs get our settings; one that exists keeps its other ones."""
    try:
        template = copy.deepcopy(client.read_work_pool(name).base_job_template)
    except ObjectNotFound:
        template = copy.deepcopy(ProcessWorker.get_default_base_job_template())
        _set_environment(template)
        client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
    else:
        _set_environment(template)
        client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))


def _set_environment(template: dict[str, Any]) -> None:
    environment = template.setdefault("variables", {}).setdefault("properties", {}).setdefault("env", {})
    environment["default"] = RUN_SETTINGS | (environment.get("default") or {})


def _with_settings(job_variables: dict[str, Any]) -> dict[str, Any]:
    """A run of any pool, also of one that is not ours, must send heartbeats often enough."""
    return job_variables | {"env": RUN_SETTINGS | job_variables.get("env", {})}


def _reason(error: Exception) -> str:
    try:
        said = error.response.json()["detail"] if isinstance(error, PrefectHTTPStatusError) else error
    except (ValueError, LookupError, TypeError):  # a proxy between answers as it likes
        said = error
    return " ".join(str(said or error).split())
