"""A repository of models on the Hub, in the few operations that publishing a version needs."""

import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from registry.artifact import FileEntry
from registry.errors import (
    HubConflictError,
    HubRaceError,
    IntegrityError,
    InvalidDescriptionError,
    NotPublishedError,
    UnsafeFileError,
    UnsafePathError,
)
from registry.hub_client import limit_waits
from registry.hub_errors import hub_errors
from registry.publication import CARD, MANIFEST, MOST_MANIFEST_BYTES, SIGNATURE, Content, Manifest
from registry.store import disk_errors, hash_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi, RepoFile

STAGING = "bitsmith-staging-"
_HUB_OWN_FILES = {".gitattributes", CARD}
_PULL_ADVICE = "Nothing was published here. Pull a tag, or ask the repository's owner to push again."
_PUSH_ADVICE = "{where} is as it was, without a tag for this version. Run the same command again."


@contextmanager
def open_repository(
    repo_id: str, right: str, downloads: Path, endpoint: str | None, token: str | None
) -> Iterator["HubRepository"]:
    """The repository, and the client's errors translated.

    Args:
        right: "read" or "write", for the text of errors.
        downloads: a folder for files under way, which may be gone on with.
    """
    from huggingface_hub import HfApi, get_token

    with disk_errors(downloads):
        downloads.mkdir(parents=True, exist_ok=True)
    token = (token or get_token() or "").strip() or None
    limit_waits()
    with hub_errors(repo_id, right, token, downloads):
        yield HubRepository(HfApi(endpoint=endpoint, token=token, library_name="bitsmith"), repo_id, downloads)


@dataclass(frozen=True)
class HubRepository:
    """Made by `open_repository`."""

    api: "HfApi"
    repo_id: str
    downloads: Path

    # What is there; every answer comes from the server

    def resolve(self, revision: str | None) -> str:
        """The commit that a branch, a tag or a shortened commit names now."""
        return self._known(self.api.model_info(self.repo_id, revision=revision or "main").sha)

    def tags(self) -> dict[str, str]:
        """tag -> commit"""
        return {tag.name: tag.target_commit for tag in self.api.list_repo_refs(self.repo_id).tags}

    def branches(self) -> dict[str, str]:
        """branch -> commit"""
        return {branch.name: branch.target_commit for branch in self.api.list_repo_refs(self.repo_id).branches}

    def files(self, commit: str) -> dict[str, "RepoFile"]:
        """path -> what the server lists: size, and sha256 or git blob id."""
        from huggingface_hub import RepoFile

        tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
        return {item.path: item for item in tree if isinstance(item, RepoFile)}

    def manifest(self, commit: str, remote: Mapping[str, "RepoFile"]) -> tuple[Manifest, bytes]:
        """What the repository says that it holds at `commit`, and the text in which it says so.

        Raises:
            NotPublishedError: it has no manifest.
            InvalidDescriptionError, IntegrityError: the manifest is not one of bitsmith's.
        """
        if MANIFEST not in remote:
            branches = [name for name in self.branches() if name != "main" and not name.startswith(STAGING)]
            if branches:
                advice = (
                    f"But it has branches: name one, such as {self.repo_id}@{branches[0]} ({', '.join(branches[:9])})."
                )
            else:
                advice = "Open it with transformers' from_pretrained instead."
            raise NotPublishedError(
                f"{self.repo_id} has no {MANIFEST} there: that was not published by bitsmith, and there is nothing to "
                f"check its files against. {advice}"
            )
        content = self.small_file(MANIFEST, commit, remote[MANIFEST])
        return Manifest.from_json(content), content

    def small_file(self, path: str, commit: str, listed: "RepoFile") -> bytes:
        """The bytes of a file that no manifest describes, which the server's listing has to agree with."""
        if listed.size > MOST_MANIFEST_BYTES:
            most = f"at most {MOST_MANIFEST_BYTES} bytes"
            raise IntegrityError(f"{path} in {self.repo_id}", most, f"{listed.size} bytes", _PULL_ADVICE)
        with tempfile.TemporaryFile(dir=self.downloads) as file:
            self._get(path, commit, file, listed.size)
            file.seek(0)
            content = file.read()
        if not Content(content, FileEntry.of_bytes(content)).equals(listed):
            found = FileEntry.of_bytes(content)
            raise IntegrityError(f"{path} in {self.repo_id}", _listed(listed), _in_words(found), _PULL_ADVICE)
        return content

    def fetch(self, path: str, commit: str, entry: FileEntry) -> Path:
        """Download one file, going on with what an earlier attempt left; the caller takes it away.

        Raises:
            IntegrityError: its bytes are not those of `entry`; nothing of it is kept.
        """
        part = self.downloads / f"{entry.sha256}.part"
        went_on = part.exists()
        try:
            with part.open("ab") as file:
                self._get(path, commit, file, entry.size_bytes)
        except IntegrityError:
            part.unlink(missing_ok=True)
            raise
        if (found := hash_file(part)) == entry:
            return part
        part.unlink(missing_ok=True)
        if went_on:  # perhaps only its beginning was bad
            return self.fetch(path, commit, entry)
        raise IntegrityError(path, _in_words(entry), _in_words(found), _PULL_ADVICE)

    def _get(self, path: str, commit: str, file: BinaryIO, size_bytes: int) -> None:
        """Go on writing at the end of `file`; the client's cache, which might be out of date, is not asked nor filled.

        Raises:
            IntegrityError: the server sends more or fewer bytes than `size_bytes`.
        """
        from huggingface_hub.file_download import hf_hub_url, http_get
        from huggingface_hub.utils import build_hf_headers

        if file.tell() > size_bytes:
            file.seek(0)
            file.truncate()
        if size_bytes == 0:
            return
        headers = build_hf_headers(token=self.api.token, library_name=self.api.library_name)
        url = hf_hub_url(self.repo_id, path, revision=commit, endpoint=self.api.endpoint)
        try:
            http_get(
                url,
                file,
                resume_size=file.tell(),
                headers=headers | {"Accept-Encoding": "identity"},
                expected_size=size_bytes,
                displayed_filename=path,
            )
        except OSError as error:
            if "onsistency check failed" not in str(error):
                raise
            raise IntegrityError(path, f"{size_bytes} bytes", f"{file.tell()} bytes", _PULL_ADVICE) from None

    def check_listing(self, manifest: Manifest, remote: Mapping[str, "RepoFile"]) -> None:
        """Refuse before a byte is fetched what the listing already shows to be wrong."""
        for path, entry in manifest.files.items():
            found = remote.get(path)
            if found is None or found.size != entry.size_bytes or (found.lfs and found.lfs.sha256 != entry.sha256):
                raise IntegrityError(path, _in_words(entry), _listed(found), _PULL_ADVICE)

    def published(
        self, commit: str, remote: Mapping[str, "RepoFile"], wanted: Manifest, contents: Mapping[str, Content]
    ) -> bytes | None:
        """The manifest at `commit`, if the version and its report are there; the card may have been made anew since."""
        if MANIFEST not in remote:
            return None
        found, text = self.manifest(commit, remote)
        if (found.artifact, found.report) != (wanted.artifact, wanted.report):
            return None
        is_whole = all(contents[path].equals(remote.get(path)) for path in wanted.files if path != CARD)
        return text if is_whole else None

    def stale_files(self, head: str, remote: Mapping[str, "RepoFile"], contents: Mapping[str, Content]) -> list[str]:
        """What the version published before had and this one lacks: left there, both would be loaded.

        Raises:
            HubConflictError: the repository holds files and was not published by bitsmith.
        """
        if MANIFEST in remote:
            try:
                published = {*self.manifest(head, remote)[0].files, SIGNATURE} - {CARD}
            except (InvalidDescriptionError, IntegrityError, UnsafePathError, UnsafeFileError) as error:
                raise HubConflictError(
                    f"{self.repo_id} has a {MANIFEST} that is damaged ({error}), so that nobody knows which files "
                    "belong to the version there. Nothing was sent. Remove it and them on the repository's page, "
                    "then push again."
                ) from error
            return sorted((published & set(remote)) - set(contents))
        if foreign := sorted(set(remote) - _HUB_OWN_FILES - set(contents)):
            raise HubConflictError(
                f"{self.repo_id} holds files that bitsmith did not publish ({', '.join(foreign[:5])}), and "
                "they would be loaded together with the version. Nothing was sent. Name another repository."
            )
        return []

    # What is made; each may be repeated

    def create(self, private: bool, branch: str) -> str:
        """Make the repository and the branch if they are missing; the commit at the branch's head.

        Raises:
            HubConflictError: it exists and is public, and was to be private.
        """
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
        if branch == "main":
            return self._known(found.sha)
        branches = self.branches()
        if branch not in branches:
            first = self.api.list_repo_commits(self.repo_id, revision="main")[-1].commit_id  # before any version
            self.api.create_branch(self.repo_id, branch=branch, revision=first, exist_ok=True)
            branches = self.branches()
        return self._known(branches.get(branch))

    @contextmanager
    def staging(self, head: str, key: str) -> Iterator[str]:
        """A branch at `head` to try a commit on, which goes when the block ends, and with it what kills left.

        Args:
            key: names what is pushed. Who pushes the same at the same time may lose the branch, and tries again.
        """
        from huggingface_hub.errors import RevisionNotFoundError

        self.remove_staging(key)
        name = f"{_staging_prefix(key)}{secrets.token_hex(4)}"
        self.api.create_branch(self.repo_id, branch=name, revision=head)
        try:
            yield name
        except RevisionNotFoundError as error:
            if name not in str(error):
                raise
            raise HubRaceError(
                f"Someone else is pushing the same to {self.repo_id}, and made room for it. Run the same command again."
            ) from None
        finally:
            self._remove_branch(name)

    def remove_staging(self, key: str) -> None:
        """The branches that killed pushes of `key` left."""
        for left in self.branches():
            if left.startswith(_staging_prefix(key)):
                self._remove_branch(left)

    def commit(
        self, changed: Mapping[str, Content], stale: list[str], *, branch: str, parent: str, message: str
    ) -> str:
        """One atomic commit on top of `parent`; its id. The server answers 412 if the branch has moved on.

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
            revision=branch,
            parent_commit=parent,
        )
        return committed.oid

    def check(self, commit: str, contents: Mapping[str, Content], expected: set[str], where: str) -> None:
        """Compare all that the server lists at `commit` with what was to be there.

        Args:
            expected: all paths, those of others included.
        Raises:
            HubRaceError: there are more or fewer files: the client makes no commit where all is there already, and then
                answers with somebody else's.
            IntegrityError: a file was changed or dropped on the way.
        """
        remote = self.files(commit)
        for path, content in contents.items():
            if not content.equals(found := remote.get(path)):
                what = f"{path} in {self.repo_id}"
                advice = _PUSH_ADVICE.format(where=where)
                if found is None:
                    advice += " Should it be missing again: does a .gitignore in the repository name it?"
                raise IntegrityError(what, _in_words(content.entry), _listed(found), advice)
        if others := sorted(set(remote) ^ expected):
            raise HubRaceError(
                f"Someone else changed {self.repo_id} at the same moment ({', '.join(others[:3])}). Nothing of theirs "
                "was overwritten. Look at what they did, then run the same command again."
            )

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
            "Tags are never moved. Name another with --tag, or push to another repository."
        )

    def url(self, revision: str) -> str:
        return f"{self.api.endpoint}/{self.repo_id}/tree/{revision}"

    def _remove_branch(self, name: str) -> None:
        """Best effort: what is left is empty of meaning, and the next push of the same removes it."""
        from huggingface_hub.errors import HfHubHTTPError, HTTPError

        with suppress(HfHubHTTPError, HTTPError, OSError):
            self.api.delete_branch(self.repo_id, branch=name)

    def _known(self, commit: str | None) -> str:
        if not commit:
            raise HubConflictError(f"{self.repo_id} has no commit on main. Make it anew, or choose another.")
        return commit


def _staging_prefix(key: str) -> str:
    return f"{STAGING}{key[:12]}-"


def _in_words(entry: FileEntry) -> str:
    return f"sha256 {entry.sha256} and {entry.size_bytes} bytes"


def _listed(remote: "RepoFile | None") -> str:
    if remote is None:
        return "no such file"
    oid = f"sha256 {remote.lfs.sha256}" if remote.lfs else f"git blob {remote.blob_id}"
    return f"{oid} and {remote.size} bytes"
