"""The page of a repository that has its versions on branches: README.md on main, made from what the branches hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from registry.errors import HubConflictError
from registry.hub_repository import STAGING, HubRepository
from registry.publication import CARD, MANIFEST, Content

Facts = Mapping[str, Mapping[str, bytes]]


@dataclass(frozen=True)
class Overview:
    """How to make the page.

    Attributes:
        paths: the small files to read from every branch, where it has them.
        render: branch -> path -> bytes, to the text of the page.
    """

    paths: tuple[str, ...]
    render: Callable[[Facts], str]


def check_main_is_free(repository: HubRepository) -> None:
    """Raises HubConflictError where main holds a version, or files of others: their card would be overwritten."""
    head = repository.resolve("main")
    remote = repository.files(head)
    if MANIFEST not in remote:
        repository.stale_files(head, remote, {})
    else:
        raise HubConflictError(
            f"{repository.repo_id} has a version on main, as `--layout repo` publishes it; its card cannot be the page "
            "of the branches too. Nothing was sent. Name another repository."
        )


def write_overview(repository: HubRepository, overview: Overview) -> None:
    """Bring the page up to date by one commit, unless it is.

    Raises:
        HubRaceError: main moved on meanwhile.
    """
    facts = {}
    for branch, commit in sorted(repository.branches().items()):
        if branch == "main" or branch.startswith(STAGING):
            continue
        remote = repository.files(commit)
        if MANIFEST in remote:
            found = {
                path: repository.small_file(path, commit, remote[path]) for path in overview.paths if path in remote
            }
            facts[branch] = found
    head = repository.resolve("main")
    page = Content.of_text(overview.render(facts))
    if not page.equals(repository.files(head).get(CARD)):
        repository.commit({CARD: page}, [], branch="main", parent=head, message="Overview of the branches by bitsmith")
