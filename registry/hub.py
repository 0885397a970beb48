"""The Hugging Face Hub as a mirror: `push` writes one atomic commit and a tag, `pull` trusts no byte.

A repository holds the files of one version as they are, `bitsmith-manifest.json` (the artifact's description
with the sha256 of every file) and the model card; the tag `v<number>` never moves.

The client chooses Xet by itself and sends large files over it. A server without Xet (some private hubs) needs
HF_HUB_DISABLE_XET=1 in the environment before `huggingface_hub` is first imported.
"""

from dataclasses import dataclass

from registry.artifact import Artifact, FileEntry
from registry.errors import RegistryError
from registry.hub_repository import CARD_NAME, MANIFEST_NAME, Content, open_repository
from registry.progress import SILENT, Progress
from registry.registry import Registry
from registry.version import Version, checked_name


@dataclass(frozen=True)
class PushResult:
    """A version on the Hub.

    Attributes:
        commit: 40 hex digits; what the tag names.
        url: a page that people can open.
        num_uploaded: files that the commit added or changed; 0 if everything was there.
        num_unchanged: files that were there already.
    """

    repo_id: str
    commit: str
    tag: str
    url: str
    num_uploaded: int
    num_unchanged: int


def push(
    registry: Registry,
    reference: str,
    repo_id: str,
    *,
    private: bool = False,
    card: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    progress: Progress = SILENT,
) -> PushResult:
    """Publish a version as `repo_id`: repository, one commit, every remote hash checked, then the tag.

    Run again, it sends only what is missing and ends in the same state. Files of the version published there
    before that this one lacks are removed in the same commit; other files are left alone.

    Args:
        reference: "name" or "name:3".
        private: make a new repository private; one that exists and is public is then refused.
        card: the text of README.md, with its YAML header. None leaves the page as it is.
        endpoint, token: default to HF_ENDPOINT and to the login of `hf auth login` or HF_TOKEN.
    Raises:
        HubAuthError, HubNotFoundError, HubUnavailableError: as the server answered.
        HubConflictError: a commit came between, the tag names other content, or the repository holds files
            and was not published by bitsmith.
        IntegrityError: a local file is damaged (nothing was sent), or a remote one is (no tag was made).
        RegistryError: the artifact has a README.md of its own and `card` was given too.
    """
    version = registry.version(reference)
    contents = _contents(registry, registry.get(version.digest), card)
    tag = f"v{version.number}"
    with open_repository(repo_id, "write", registry.root / "pulls", endpoint, token) as repository:
        head = repository.create(private)
        if tagged := repository.tags().get(tag):
            if not repository.holds(tagged, contents):
                raise repository.tag_conflict(tag, tagged)
            return PushResult(repo_id, tagged, tag, repository.url(tag), 0, len(contents))
        progress.say(f"Comparing {len(contents)} files of {version} with {repo_id}.")
        remote = repository.files(head)
        changed = {path: file for path, file in contents.items() if not file.equals(remote.get(path))}
        stale = repository.stale_files(head, remote, contents)
        commit = head
        if changed or stale:
            progress.say(f"Sending {len(changed)} files to {repo_id}.")
            commit = repository.commit(changed, stale, parent=head, message=f"{version} by bitsmith")
            repository.check(commit, contents)
        repository.tag(tag, commit)
        num_unchanged = len(contents) - len(changed)
        return PushResult(repo_id, commit, tag, repository.url(tag), len(changed), num_unchanged)


def pull(
    repo_id: str,
    registry: Registry,
    *,
    name: str | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    progress: Progress = SILENT,
) -> Version:
    """Bring a version from the Hub into `registry`, every byte checked against its manifest first.

    The revision is resolved to a commit online, so that no cached answer stands in for a dead server. Files
    that the manifest does not list are never fetched; files that the registry has are not fetched again.

    Args:
        name: to publish it under; by default the last part of `repo_id`.
        revision: branch, tag or commit; by default the head of main.
    Raises:
        NotPublishedError: the repository has no manifest.
        IntegrityError: a file is not what the manifest says. Nothing was added.
        UnsafePathError: the manifest names a file outside its folder. Nothing was added.
        InvalidDescriptionError: the manifest cannot be read.
        HubAuthError, HubNotFoundError, HubUnavailableError: as the server answered.
    """
    name = checked_name(name or repo_id.rsplit("/", 1)[-1])
    with open_repository(repo_id, "read", registry.root / "pulls", endpoint, token) as repository:
        commit = repository.resolve(revision)
        remote = repository.files(commit)
        artifact = repository.manifest(commit, remote)
        repository.check_listing(artifact, remote)
        wanted = {path: entry for path, entry in artifact.files.items() if not registry.store.is_sound(entry)}
        fetched = {}
        for path, entry in progress.track(wanted.items(), f"pull {repo_id}", len(wanted)):
            fetched[path] = repository.fetch(path, commit, entry)
        for path, file in fetched.items():
            registry.store.adopt(file, wanted[path])
    registry.record(artifact)
    return registry.publish(name, artifact, note=f"pulled from {repo_id} at {commit}")


def _contents(registry: Registry, artifact: Artifact, card: str | None) -> dict[str, Content]:
    """path in the repository -> what shall be there."""
    if MANIFEST_NAME in artifact.files:
        raise RegistryError(f"The version has a file {MANIFEST_NAME}, which publishing writes itself. Rename it.")
    if card is not None and CARD_NAME in artifact.files:
        raise RegistryError(
            f"The version has a {CARD_NAME} of its own; a card in its place would have the wrong hash for "
            "whoever pulls it. Leave the card out, or make the version without that file."
        )
    contents = {path: Content(registry.path(artifact, path), entry) for path, entry in artifact.files.items()}
    texts = {MANIFEST_NAME: artifact.to_json() + "\n"} | ({CARD_NAME: card} if card is not None else {})
    for path, text in texts.items():
        contents[path] = Content(text.encode(), FileEntry.of_bytes(text.encode()))
    return contents
