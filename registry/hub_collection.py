"""A collection on the Hub: the budgets of one model side by side, on one page."""

from pathlib import Path

from registry.hub_client import limit_waits
from registry.hub_errors import hub_errors
from registry.patience import Patience
from registry.progress import SILENT, Progress


def add_to_collection(
    repo_id: str,
    title: str,
    note: str,
    *,
    private: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
    patience: Patience | None = None,
    progress: Progress = SILENT,
) -> str:
    """Let the collection of that title, of the repository's owner, have the repository with that note; its page.

    The collection is made if it is missing. Run again, it only brings the note up to date.

    Args:
        note: at most 500 characters.
        private: make a new collection private.
    Raises:
        HubAuthError, HubUnavailableError, HubError: as the server answered.
    """
    from huggingface_hub import HfApi, get_token

    token = token or get_token()
    limit_waits()
    api = HfApi(endpoint=endpoint, token=token, library_name="bitsmith")

    def attempt() -> str:
        with hub_errors(f"the collection {title!r}", "write", token, Path()):
            found = api.create_collection(title, namespace=repo_id.split("/")[0], private=private, exists_ok=True)
            item = next((item for item in found.items if item.item_id == repo_id), None)
            if item is None:
                api.add_collection_item(found.slug, repo_id, "model", note=note, exists_ok=True)
            elif item.note != note:
                api.update_collection_item(found.slug, item.item_object_id, note=note)
            return f"{api.endpoint}/collections/{found.slug}"

    return (patience or Patience()).run(attempt, progress)
