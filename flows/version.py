"""Deployments are tagged with the version that made them; a worker with another one refuses to run them.

Another version may give other bytes, or know other parameters: better one clear message than a night of both.
"""

from prefect.runtime import flow_run

from flows.errors import OtherVersionError
from pipeline.version import VERSION

TAG = "bitsmith"  # on every run of a deployment, for the automations
WITHIN = "bitsmith-within"  # in its place on the runs inside of that one: one message is enough where all are dead
SERVED = "bitsmith-served"  # on those of `serve`, which have no work pool to be told by
PREFIX = f"{TAG}=="


def version_tag(version: str = VERSION) -> str:
    """`bitsmith==0.1.0`"""
    return f"{PREFIX}{version}"


def tags_within() -> list[str]:
    """For the runs inside of this one."""
    return [WITHIN if tag == TAG else tag for tag in flow_run.tags or ()]


def check_version() -> None:
    """Raise OtherVersionError where the run's deployment was made by another version than this one."""
    made_by = [tag.removeprefix(PREFIX) for tag in flow_run.tags or () if tag.startswith(PREFIX)]
    if made_by and VERSION not in made_by:
        raise OtherVersionError(
            f"This worker has bitsmith {VERSION}, and the deployment was made with {made_by[0]}. Install "
            f"bitsmith=={made_by[0]} where the worker runs, or run `python -m flows deploy` with bitsmith {VERSION}."
        )
