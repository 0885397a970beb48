"""The flow `watch`: every night, a new version of what changed, if it is good enough.

Base revision or recipe changed: compress, evaluate, gate, publish on the Hub, promote. Unchanged: the run is Skipped
within seconds. A gate that refuses: the run is Gated, and what people use stays as it is.
"""

from pathlib import Path
from typing import Any, Literal

from prefect import flow, tags
from prefect.runtime import flow_run
from prefect.states import State

from flows import release
from flows.compress import compress
from flows.notify import WATCHED
from flows.states import gated, skipped
from flows.version import check_version, tags_within


def run_name() -> str:
    """`SmolLM2-135M-Instruct at 2.5bpw, 3bpw if changed`"""
    recipe, budgets = flow_run.parameters["recipe"], flow_run.parameters.get("budgets")
    return f"{Path(str(recipe.get('model'))).name} at {', '.join(budgets or [str(recipe.get('budget'))])} if changed"


@flow(name="watch", flow_run_name=run_name, **WATCHED)
def watch(
    recipe: dict[str, Any],
    out: str,
    budgets: list[str] | None = None,
    name: str | None = None,
    gates: list[str] | None = None,
    repo: str | None = None,
    layout: Literal["repo", "branches"] = "repo",
    private: bool = False,
    alias: str | None = None,
    registry: str | None = None,
    device: str = "cpu",
    runner: str = "threads",
) -> list[str] | State[Any]:
    """Compress a model again if no version of it is of its base, as it is on the Hub now, and of the recipe.

    A run goes on where an earlier one ended: what was compressed and not published yet is published.

    Args:
        recipe, budgets, name, registry, device, runner: as of `compress`.
        out: a folder for each state of base and recipe is made below it.
        gates: such as `kld<=0.05`; a version that does not meet all is neither published nor promoted.
        repo: user/name on the Hub, if versions are to be published there.
        layout: with several budgets, `branches`: one repository with a branch for each.
        alias: such as production, if it is to name the new versions; one that was moved by hand stays until then.
    Returns:
        The versions; or one of the states Skipped, with the reason, and Gated, with the figures.
    """
    check_version()
    found = release.look(recipe, budgets, registry, out, name, gates or [], repo, alias)
    if found["is_settled"]:
        return skipped(found["reason"])
    versions = found["versions"]
    if found["is_new"]:
        with tags(*tags_within()):
            made = compress(recipe, found["out"], budgets, name or Path(out).name, registry, device, runner)
        versions = [outcome["version"] for outcome in made]
    verdicts = release.judge(versions, gates or [], registry)
    for version in [verdict["version"] for verdict in verdicts if verdict["refusal"] is None]:
        if repo:
            release.push(version, repo, registry, private=private, layout=layout)
        if alias:
            release.promote(version, alias, gates or [], registry)
    refusals = [verdict["refusal"] for verdict in verdicts if verdict["refusal"]]
    return gated(refusals) if refusals else [verdict["version"] for verdict in verdicts]
