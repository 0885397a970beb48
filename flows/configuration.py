"""prefect.yaml, Prefect's own file of deployments, read and checked before a server hears of it.

    deployments:
      - name: nightly                       # unique in the file
        entrypoint: flows.watch.watch       # a flow of the installed package: workers need no copy of the source
        parameters: {...}                   # checked as the flow will check them
        schedule: {cron: "0 2 * * *", timezone: Europe/Berlin}      # or interval: 3600 (seconds), or `schedules:`
        work_pool: {name: bitsmith-gpu}     # bitsmith-cpu by default
        concurrency_limit: {limit: 1, collision_strategy: CANCEL_NEW}   # the default: late runs become one

`prefect deploy --all` reads the same file; what it would do before or around that (build, push, pull) it does alone.
"""

from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows.errors import DeployError

if TYPE_CHECKING:
    from prefect import Flow

FILE = Path("prefect.yaml")
CPU_POOL, GPU_POOL = "bitsmith-cpu", "bitsmith-gpu"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Schedule(_Strict):
    """When: one of cron, interval and rrule; `day_or` belongs to cron, `anchor_date` to interval."""

    cron: str | None = None
    interval: timedelta | None = None
    rrule: str | None = None
    timezone: str | None = None
    anchor_date: datetime | None = None
    active: bool = True
    parameters: dict[str, Any] = Field(default_factory=dict)
    slug: str | None = None
    day_or: bool | None = None


class Limit(_Strict):
    """How many runs of a deployment at once, and what becomes of one more."""

    limit: int = Field(1, ge=1)
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] = "CANCEL_NEW"
    grace_period_seconds: int | None = Field(None, ge=60, le=86400)


class JobVariables(BaseModel):
    """What a pool's template asks for; the server checks all but the environment, where null takes a variable away."""

    model_config = ConfigDict(frozen=True, extra="allow")
    env: dict[str, str | None] = Field(default_factory=dict)


class WorkPool(_Strict):
    """Where."""

    name: str = CPU_POOL
    work_queue_name: str | None = None
    job_variables: JobVariables = Field(default_factory=JobVariables)


class Deployment(_Strict):
    """One entry of the file."""

    name: str = Field(pattern=r"^[^\s/%&<>]([^/%&<>]*[^\s/%&<>])?$")  # what Prefect takes, and no blank around it
    entrypoint: str
    description: str | None = None
    version: str | None = None
    tags: tuple[str, ...] = ()
    parameters: dict[str, Any] = Field(default_factory=dict)
    schedule: Schedule | None = None
    schedules: tuple[Schedule, ...] = ()
    paused: bool | None = None
    concurrency_limit: Annotated[int, Field(ge=1)] | Limit = Field(default_factory=lambda: Limit.model_validate({}))
    work_pool: WorkPool = Field(default_factory=WorkPool)
    enforce_parameter_schema: bool = True

    @property
    def limit(self) -> Limit:
        """A bare number is the file's way to say: so many, and others wait."""
        found = self.concurrency_limit
        return (
            found
            if isinstance(found, Limit)
            else Limit.model_validate({"limit": found, "collision_strategy": "ENQUEUE"})
        )

    @property
    def all_schedules(self) -> tuple[Schedule, ...]:
        """One or several."""
        return (*((self.schedule,) if self.schedule else ()), *self.schedules)

    def flow(self) -> "Flow[..., Any]":
        """What the entrypoint names. Raises DeployError where that is no flow of the package."""
        from prefect.flows import load_flow_from_entrypoint

        try:
            if not self.entrypoint.startswith("flows."):
                raise ValueError("it is no part of the package")
            return load_flow_from_entrypoint(self.entrypoint)
        except Exception as error:  # whatever an import does
            raise DeployError(
                f"Deployment {self.name}: {self.entrypoint!r} is no flow of this package ({error}). Expected one of "
                f"{', '.join(f'flows.{name}.{name}' for name in FLOWS)}."
            ) from error


FLOWS = ("compress", "sweep", "watch", "evaluate", "publish", "collect_garbage")


class _File(_Strict):
    name: str | None = None
    prefect_version: str | None = Field(None, alias="prefect-version")
    definitions: Any = None  # for YAML anchors
    build: Any = None
    push: Any = None
    pull: Any = None
    deployments: tuple[Deployment, ...] = ()


def read_configuration(path: Path = FILE) -> tuple[Deployment, ...]:
    """The file's deployments, with everything checked that needs no server.

    Raises:
        DeployError: the file is missing or malformed; names the deployment and what is wrong with it.
        PipelineError: a parameter is wrong, see flows/parameters.py.
    """
    from flows.parameters import check_apart, check_parameters
    from flows.schedules import check_schedule

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DeployError(
            f"There is no {path}. Write one, or name another file with --file; the package's source has an example, "
            "prefect.yaml, and docs/operating.md explains it."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DeployError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from error
    try:
        file = _File.model_validate(content or {})
    except ValidationError as error:
        raise DeployError(f"{path} is not as expected: {_faults(error, content)}.") from None
    if file.build or file.push or file.pull:
        raise DeployError(
            f"{path} has steps to build, push or pull code. `python -m flows` takes the flows from the installed "
            "package: remove the steps, or use `prefect deploy --all`."
        )
    if not file.deployments:
        raise DeployError(f"{path} has no deployments. prefect.yaml of this package's source is an example.")
    names = Counter(deployment.name for deployment in file.deployments)
    if twice := [name for name, number in names.items() if number > 1]:
        raise DeployError(f"{path} has several deployments called {', '.join(twice)}. Give each a name of its own.")
    for deployment in file.deployments:
        for schedule in deployment.all_schedules:
            check_schedule(deployment.name, schedule)
        check_parameters(deployment.name, deployment.flow(), deployment.parameters)
        for schedule in deployment.all_schedules:
            if schedule.parameters:
                check_parameters(deployment.name, deployment.flow(), deployment.parameters | schedule.parameters)
    check_apart(
        (deployment.name, deployment.parameters | parameters)
        for deployment in file.deployments
        if deployment.flow().name == "watch"
        for parameters in ({}, *(schedule.parameters for schedule in deployment.all_schedules))
    )
    return file.deployments


def find(deployments: tuple[Deployment, ...], name: str) -> Deployment:
    """Raises DeployError where no deployment has the name."""
    for deployment in deployments:
        if deployment.name == name:
            return deployment
    known = ", ".join(deployment.name for deployment in deployments)
    raise DeployError(f"There is no deployment {name!r}. The file has {known}.")


def _faults(error: ValidationError, content: Any) -> str:
    faults = []
    for fault in error.errors():
        place = list(fault["loc"])
        if place[:1] == ["deployments"] and len(place) > 1:
            place[:2] = [_name(content, place[1])]
        faults.append(f"{'.'.join(map(str, place)) or 'the file'}: {fault['msg']}")
    return "; ".join(dict.fromkeys(faults))


def _name(content: Any, number: Any) -> str:
    try:
        return f"deployment {content['deployments'][number]['name']}"
    except (KeyError, IndexError, TypeError):
        return f"deployment number {number + 1}"
