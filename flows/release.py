"""What is done about versions, as tasks: is there anything new, do gates let it pass, the Hub, the alias.

Plain JSON in and out. Only what looks at the Hub may be tried again, and only after a network's failure: a push tries
again by itself (registry/patience.py).
"""

from pathlib import Path
from typing import Any, TypedDict

from prefect import task
from prefect.artifacts import create_link_artifact

from flows.job import out_folder, registry_folder
from flows.steps import OPENING, PLAIN
from flows.summary import artifact_key, show_beside_last
from pipeline.budget import Budget
from pipeline.gate import Requirement
from pipeline.recipe import Recipe
from registry import Registry, Version
from registry.publication import REPORT_FOLDER

BY_FLOW = "by a flow"  # the reason of a move that nobody decided on


class Looked(TypedDict):
    """What `look` found.

    Attributes:
        versions: that are as they should be now, one for each budget; empty where there is something to compress.
        out: folder for what is compressed now; another one for another base or recipe.
        is_new: there is something to compress.
        is_settled: there is nothing to compress, and these versions are published and promoted; or they were, and
            somebody took the alias from them.
        reason: both of it in words.
    """

    versions: list[str]
    out: str
    is_new: bool
    is_settled: bool
    reason: str


class Verdict(TypedDict):
    """`refusal` is None where all gates let the version pass."""

    version: str
    refusal: str | None


@task(**OPENING)
def look(
    recipe: dict[str, Any],
    budgets: list[str] | None,
    registry: str | None,
    out: str,
    name: str | None,
    gates: list[str],
    repo: str | None,
    alias: str | None,
) -> Looked:
    """Has the base or the recipe changed since there were versions of it? No model is loaded to find out.

    Raises:
        GateError: it has, and the evaluation of such a model does not measure what a gate asks for.
    """
    from flows.measured import check_measured
    from flows.progress import RunProgress
    from pipeline.news import read_news
    from pipeline.sources import find_source

    for gate in gates:  # now, and not after the work
        Requirement.parse(gate)
    store = open_registry(registry)
    recipes = [Recipe.from_json(recipe | {"budget": budget}) for budget in budgets or [str(recipe.get("budget"))]]
    names = version_names(name or Path(out).name, [each.budget for each in recipes])
    news = read_news(store, recipes, names, RunProgress())
    if news.changes and gates:  # it is fetched here, where it must be, for the work that follows
        base = recipes[0]
        source = find_source(base.model, base.revision, RunProgress(), trust_remote_code=base.trust_remote_code)
        check_measured(gates, base, source.path)
    versions = list(news.versions)
    unsettled = _unsettled(store, versions, gates, repo, alias)
    reason = "; ".join(news.changes) or f"{recipe['model']} is {news.base[:12]} and its recipe is the same, as when "
    if not news.changes:
        reason += f"{', '.join(versions)} {'was' if len(versions) == 1 else 'were'} made"
        reason += "".join(f"; {each}" for each in [*unsettled, *_left_by_hand(store, versions, alias)])
    # several budgets have folders of their own below one; another single budget is another checkpoint
    folder = news.key if len(recipes) > 1 else f"{news.key}-{Budget.parse(recipes[0].budget).label}"
    RunProgress().say(f"{'New' if news.changes else 'Unchanged'}: {reason}.")
    return Looked(
        versions=versions,
        out=str(out_folder(out) / folder),
        is_new=bool(news.changes),
        is_settled=not news.changes and not unsettled,
        reason=f"{reason}.",
    )


@task(**PLAIN)
def judge(references: list[str], gates: list[str], registry: str | None) -> list[Verdict]:
    """Do the versions meet the gates? Their figures beside those of the version before, as a table."""
    store = open_registry(registry)
    verdicts = []
    for version in (str(store.version(each)) for each in references):
        verdicts.append(Verdict(version=version, refusal=_refusal(store, version, gates)))
        show_beside_last(store, version)
    return verdicts


@task(**PLAIN)
def push(
    version: str,
    repo: str,
    registry: str | None,
    tag: str | None = None,
    private: bool = False,
    layout: str = "repo",
    collection: str | None = None,
) -> str:
    """The version on the Hub: the URL of its page. Done again, it sends nothing."""
    from flows.progress import RunProgress
    from pipeline.release import Layout, push_version

    store = open_registry(registry)
    released = push_version(
        store,
        version,
        repo,
        private=private,
        layout=Layout(layout),
        tag=tag,
        collection=collection,
        progress=RunProgress(),
    )
    url, made = released.pushed.url, store.version(version)
    create_link_artifact(url, key=f"{artifact_key(made.name)}-hub", description=f"{version} at {repo}")
    if made.report_digest:  # the link that `compress` gave is of the disk of its worker
        create_link_artifact(
            f"{url}/{REPORT_FOLDER}", key=f"{artifact_key(made.name)}-report", description=f"The report of {version}"
        )
    return url


@task(**PLAIN)
def promote(version: str, alias: str, gates: list[str], registry: str | None) -> None:
    """NAME@alias names the version now, unless somebody took it away from there."""
    from flows.progress import RunProgress
    from pipeline.release import promote as promote_version

    store = open_registry(registry)
    name = store.version(version)
    if by_hand := _moved_by_hand(store, name, alias):
        RunProgress().say(f"{by_hand}.")
        return
    if store.aliases(name.name).get(alias) != name.number:
        promote_version(store, version, alias, [Requirement.parse(gate) for gate in gates], BY_FLOW)
    RunProgress().say(f"{name.name}@{alias} names version {name.number}.")


def version_names(name: str, budgets: list[str]) -> list[str]:
    """In the registry: `name`, or with several budgets `name`-2.5bpw and so on, as `bitsmith compress` has them."""
    return [name] if len(budgets) == 1 else [f"{name}-{Budget.parse(budget).label}" for budget in budgets]


def open_registry(registry: str | None) -> Registry:
    """The registry of a flow's parameter."""
    return Registry(registry_folder(registry))


def _unsettled(
    store: Registry, versions: list[str], gates: list[str], repo: str | None, alias: str | None
) -> list[str]:
    """What an earlier run left undone, be it that it died, that a gate refused, or that nobody had asked yet.

    Where a version goes nowhere, gates are all that is asked of it, and it is judged anew.
    """
    from registry.publication_record import publications

    left = []
    for version in map(store.version, versions):
        if gates and not repo and not alias and _refusal(store, str(version), gates):
            left.append(f"{version} does not meet its gates")
        places = [record.metadata.get("repo_id") for record in publications(store, version.digest)]
        if repo and repo not in places:
            left.append(f"{version} is not at {repo} yet")
        named = store.aliases(version.name).get(alias) if alias else version.number
        if alias and named != version.number and not _moved_by_hand(store, version, alias):
            left.append(f"{version.name}@{alias} does not name {version} yet")
    return left


def _refusal(store: Registry, version: str, gates: list[str]) -> str | None:
    from pipeline.errors import GateError
    from pipeline.release import check_gates

    try:
        check_gates(store, version, [Requirement.parse(gate) for gate in gates])
    except GateError as error:
        return str(error)
    return None


def _left_by_hand(store: Registry, versions: list[str], alias: str | None) -> list[str]:
    named = [store.version(version) for version in versions if alias]
    return [said for version in named if (said := _moved_by_hand(store, version, str(alias)))]


def _moved_by_hand(store: Registry, version: Version, alias: str) -> str | None:
    """Who took the alias from the version that it named; None where only flows did, which go on with it."""
    moves = store.alias_moves(version.name, alias)
    named = [number for number, move in enumerate(moves) if move.to_version == version.number]
    since = moves[named[-1] + 1 :] if named else []
    if all(move.reason.startswith(BY_FLOW) for move in since):
        return None
    last = moves[-1]
    now = "nothing" if last.to_version is None else f"version {last.to_version}"
    return (
        f"{version.name}@{alias}, which named {version}, names {now} by {last.action} of {last.moved_by}, and stays so"
    )
