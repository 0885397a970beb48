"""What happens to a version after it was made: gates, the Hub, an alias. Commands and flows share it."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from pipeline.budget import Budget
from pipeline.card import collection_note, write_card
from pipeline.gate import Requirement, check
from pipeline.overview import branch_overview
from pipeline.progress import SILENT, Progress
from pipeline.version_facts import VersionFacts, figures_of
from registry import AliasMove, PushResult, Registry, Signer, add_to_collection
from registry import push as registry_push


class Layout(StrEnum):
    """Where the budgets of one model lie on the Hub."""

    REPO = "repo"
    BRANCHES = "branches"


@dataclass(frozen=True)
class Released:
    """A version on the Hub, and the page of its collection, if it was to be in one."""

    pushed: PushResult
    collection: str | None


def push_version(
    registry: Registry,
    reference: str,
    repo: str,
    *,
    private: bool = False,
    layout: Layout = Layout.REPO,
    tag: str | None = None,
    collection: str | None = None,
    signer: Signer | None = None,
    progress: Progress = SILENT,
) -> Released:
    """Push a version with its card; with `Layout.BRANCHES` onto the branch of its budget, with the page of all.

    Args:
        tag: v<number> by default, with branches <budget>-v<number>.
        collection: title of the owner's collection to list the repository in.
    Raises:
        CheckpointError: its plan, recipe or report is missing or not as bitsmith writes it.
        RegistryError: see registry.push.
    """
    version = registry.version(reference)
    facts = VersionFacts.of(registry, version)
    branch = Budget.parse(facts.recipe["budget"]).label if layout == Layout.BRANCHES else "main"
    tag = tag or (f"v{version.number}" if layout == Layout.REPO else f"{branch}-v{version.number}")
    pushed = registry_push(
        registry,
        str(version),
        repo,
        private=private,
        branch=branch,
        tag=tag,
        card=write_card(registry, version, repo, tag),
        overview=branch_overview(repo) if layout == Layout.BRANCHES else None,
        signer=signer,
        progress=progress,
    )
    page = None
    if collection is not None:
        page = add_to_collection(repo, collection, collection_note(facts), private=private, progress=progress)
    return Released(pushed, page)


def check_gates(registry: Registry, reference: str, requirements: Iterable[Requirement]) -> None:
    """Raise GateError with every figure that was asked for, unless the version meets all requirements.

    Raises:
        CheckpointError: its plan, recipe or report is not as bitsmith writes it.
    """
    version = registry.version(reference)
    check(str(version), figures_of(registry, version), requirements)


def promote(
    registry: Registry, reference: str, alias: str, requirements: Iterable[Requirement], reason: str = ""
) -> AliasMove:
    """Let `alias` name the version if it meets all requirements.

    Raises:
        GateError: it does not; the alias names what it named before.
    """
    version, asked = registry.version(reference), list(requirements)
    check_gates(registry, str(version), asked)
    gates = " ".join(map(str, asked))
    why = f"{reason} ({gates})" if reason and gates else reason or gates
    return registry.alias(str(version), alias, action=AliasMove.PROMOTE, reason=why)
