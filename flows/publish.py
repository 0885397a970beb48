"""The flow `publish`: a version of the registry on the Hub, with its card, report and lineage."""

from typing import Any, Literal

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import State

from flows import release
from flows.notify import WATCHED
from flows.states import gated
from flows.version import check_version


def run_name() -> str:
    """`smollm2-3bpw:2 to user/smollm2`"""
    return f"{flow_run.parameters['version']} to {flow_run.parameters['repo']}"


@flow(name="publish", flow_run_name=run_name, **WATCHED)
def publish(
    version: str,
    repo: str,
    gates: list[str] | None = None,
    tag: str | None = None,
    private: bool = False,
    layout: Literal["repo", "branches"] = "repo",
    collection: str | None = None,
    registry: str | None = None,
) -> str | State[Any]:
    """Push a version as `bitsmith push` does.

    Args:
        version: NAME, NAME:NUMBER or NAME@ALIAS.
        repo: user/name on the Hub.
        gates: such as `kld<=0.05`, which it must meet; else the run is Gated.
        tag: v<number> by default.
        layout: `branches`: one repository for all budgets, with a branch for each.
        collection: title of a collection to list the repository in.
    Returns:
        The page's URL.
    """
    check_version()
    (verdict,) = release.judge([version], gates or [], registry)
    if verdict["refusal"]:
        return gated([verdict["refusal"]])
    return release.push(verdict["version"], repo, registry, tag, private, layout, collection)
