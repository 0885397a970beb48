"""A repository of models on the Hub, in the few operations that publishing a version needs."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from registry.artifact import Artifact, FileEntry
from registry.errors import HubConflictError, IntegrityError, NotPublishedError
from registry.hub_errors import hub_errors
from registry.store import disk_errors, hash_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi, RepoFile

MANIFEST_NAME = "bitsmith-manifest.json"
CARD_NAME = "README.md"
_HUB_OWN_FILES = {".gitattributes", CARD_NAME}
_PULL_ADVICE = "Nothing was added to the registry. Pull a tag, or ask the repository's owner to push again."
_PUSH_ADVICE = "The commit is there but has no tag, so that nobody takes it for a version. Push again."


@dataclass(frozen=True)
class Content:
    """One file to publish: a blob of the store, or a text made for this push."""

    source: Path | bytes
    entry: FileEntry

    def equals(self, remote: "RepoFile | None") -> bool:
        """Does the server's listing say that its file has these bytes?"""
        from huggingface_hub.utils.sha import git_hash

        if remote is None or remote.size != self.entry.size_bytes:
            return False
        if remote.lfs is not None:
            return remote.lfs.sha256 == self.entry.sha256
        text = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return remote.blob_id == git_hash(text)


@contextmanager
def open_repository(
    repo_id: str, right: str, downloads: Path, endpoint: str | None, token: str | None
) -> Iterator["HubRepository"]:
    """The repository, with a folder below `downloads` that goes away, and the client's errors translated.

    Args:
        right: "read" or "write", for the text of errors.
    """
    from huggingface_hub import HfApi, get_token

    with disk_errors(downloads):
        downloads.mkdir(parents=True, exist_ok=True)
    token = token or get_token()
    with (
        hub_errors(repo_id, right, token, downloads),
        tempfile.TemporaryDirectory(dir=downloads) as folder,
    ):
        api = HfApi(endpoint=endpoint, token=token, library_name="bitsmith")
        yield HubRepository(api, repo_id, Path(folder))


@dataclass(frozen=True)
class HubRepository:
    """Made by `open_repository`.

    Attributes:
        folder: for downloads.
    """

    api: "HfApi"
    repo_id: str
    folder: Path

    def create(self, private: bool) -> str:
        """Make it if it is missing; the commit at the head of main."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            found = self.api.model_info(self.repo_id, revision="main")
        except RepositoryNotFoundError:
            self.api.create_repo(self.repo_id, private=private, exist_ok=True)
            found = self.api.model_info(self.repo_id, revision="main")
        if private and found.private is False:
            raise HubConflictError(
                f"{self.repo_id} exists and is public, and the push was to be private. Nothing was sent. "
                "Make it private in its settings, or name another repository."
            )
        return self._known(found.sha)

    def resolve(self, revision: str | None) -> str:
        """The commit that a branch, a tag or a shortened commit names now, asked online."""
        return self._known(self.api.model_info(self.repo_id, revision=revision or "main").sha)

    def tags(self) -> dict[str, str]:
        """tag -> commit"""
        return {tag.name: tag.target_commit for tag in self.api.list_repo_refs(self.repo_id).tags}

    def files(self, commit: str) -> dict[str, "RepoFile"]:
        """path -> what the server lists: size, and sha256 or git blob id."""
        from huggingface_hub import RepoFile

        tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
        return {item.path: item for item in tree if isinstance(item, RepoFile)}

    def manifest(self, commit: str, remote: Mapping[str, "RepoFile"]) -> Artifact:
        """The description of what the repository holds at `commit`. Raises NotPublishedError."""
        if MANIFEST_NAME not in remote:
            raise NotPublishedError(
                f"{self.repo_id} has no {MANIFEST_NAME}: it was not published by bitsmith, and there is "
                "nothing to check its files against. Open it with transformers' from_pretrained instead."
            )
        return Artifact.from_json(self._download(MANIFEST_NAME, commit).read_bytes())

    def fetch(self, path: str, commit: str, entry: FileEntry) -> Path:
        """Download one file and compare its bytes with `entry`."""
        file = self._download(path, commit)
        if (found := hash_file(file)) != entry:
            raise IntegrityError(path, _in_words(entry), _in_words(found), _PULL_ADVICE)
        return file

    def stale_files(self, head: str, remote: Mapping[str, "RepoFile"], contents: Mapping[str, Content]) -> list[str]:
        """What the version published before had and this one lacks: left there, both would be loaded.

        Raises:
            HubConflictError: the repository holds files and was not published by bitsmith.
        """
        if MANIFEST_NAME in remote:
            before = self.manifest(head, remote)
            return sorted((set(before.files) & set(remote)) - set(contents))
        if foreign := sorted(set(remote) - _HUB_OWN_FILES - set(contents)):
            raise HubConflictError(
                f"{self.repo_id} holds files that bitsmith did not publish ({', '.join(foreign[:5])}), and "
                "they would be loaded together with the version. Nothing was sent. Name another repository."
            )
        return []

    def commit(self, changed: Mapping[str, Content], stale: list[str], *, parent: str, message: str) -> str:
        """One atomic commit on top of `parent`; its id. The client answers 412 if main has moved on.

        Raises:
            IntegrityError: a local file is damaged; nothing was sent.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = [CommitOperationAdd(path, content.source) for path, content in sorted(changed.items())]
        for addition in additions:
            path, hashed = addition.path_in_repo, addition.upload_info
            found = FileEntry(hashed.sha256.hex(), hashed.size)
            if found != changed[path].entry:
                advice = "Nothing was sent. Run the command that made the version again."
                raise IntegrityError(path, _in_words(changed[path].entry), _in_words(found), advice)
        deletions = [CommitOperationDelete(path) for path in stale]
        committed = self.api.create_commit(
            self.repo_id,
            chain(additions, deletions),
            commit_message=message,
            revision="main",
            parent_commit=parent,
        )
        return committed.oid

    def check(self, commit: str, contents: Mapping[str, Content]) -> None:
        """Compare every file that the server lists at `commit` with what was to be published."""
        remote = self.files(commit)
        for path, content in contents.items():
            if not content.equals(found := remote.get(path)):
                what = f"{path} in {self.repo_id}"
                raise IntegrityError(what, _in_words(content.entry), _listed(found), _PUSH_ADVICE)

    def check_listing(self, artifact: Artifact, remote: Mapping[str, "RepoFile"]) -> None:
        """Refuse before a byte is fetched what the listing already shows to be wrong."""
        for path, entry in artifact.files.items():
            found = remote.get(path)
            same_size = found is not None and found.size == entry.size_bytes
            if not same_size or (found and found.lfs and found.lfs.sha256 != entry.sha256):
                raise IntegrityError(path, _in_words(entry), _listed(found), _PULL_ADVICE)

    def holds(self, commit: str, contents: Mapping[str, Content]) -> bool:
        """Does the server list these bytes at `commit`? A card edited since does not matter."""
        remote = self.files(commit)
        return all(content.equals(remote.get(path)) for path, content in contents.items() if path != CARD_NAME)

    def tag(self, tag: str, commit: str) -> None:
        """Write the tag once; HubConflictError if it came to name another commit meanwhile."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self.api.create_tag(self.repo_id, tag=tag, revision=commit)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            if (found := self.tags().get(tag)) != commit:
                raise self.tag_conflict(tag, found) from None

    def tag_conflict(self, tag: str, commit: str | None) -> HubConflictError:
        return HubConflictError(
            f"{self.repo_id} has a tag {tag} already, on commit {str(commit)[:12]} with other content. "
            "Tags are never moved. Push to another repository, or publish the model under a name of its own."
        )

    def url(self, revision: str) -> str:
        return f"{self.api.endpoint}/{self.repo_id}/tree/{revision}"

    def _known(self, commit: str | None) -> str:
        if not commit:
            raise HubConflictError(f"{self.repo_id} has no commit on main. Make it anew, or choose another.")
        return commit

    def _download(self, path: str, commit: str) -> Path:
        file = self.api.hf_hub_download(
            self.repo_id,
            path,
            revision=commit,
            local_dir=self.folder / "files",
            cache_dir=self.folder / "cache",  # the user's cache, which might be damaged, is not asked
        )
        return Path(file)


def _in_words(entry: FileEntry) -> str:
    return f"sha256 {entry.sha256} and {entry.size_bytes} bytes"


def _listed(remote: "RepoFile | None") -> str:
    if remote is None:
        return "no such file"
    oid = f"sha256 {remote.lfs.sha256}" if remote.lfs else f"git blob {remote.blob_id}"
    return f"{oid} and {remote.size} bytes"
