"""`push`: a version on the Hub by one atomic commit and a tag, or not at all.

Everything is sent to a staging branch first and every size and hash that the server lists there is compared; only then
one commit on top of the head that was read moves the branch that people see, and the tag is written, once. A push that
was killed, refused or raced leaves that branch and the tags as they were, and the next one sends what is missing.

The client chooses Xet by itself and sends large files over it. A server without Xet (some private hubs) needs
HF_HUB_DISABLE_XET=1 in the environment before `huggingface_hub` is first imported.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from registry.artifact import sha256_of
from registry.errors import InvalidNameError, SignatureError
from registry.hub_overview import Overview, check_main_is_free, write_overview
from registry.hub_repository import STAGING, HubRepository, open_repository
from registry.patience import Patience
from registry.progress import SILENT, Progress
from registry.publication import MANIFEST, SIGNATURE, Content, Publication
from registry.publication_record import record_publication
from registry.registry import Registry
from registry.signer import Signer
from registry.signing import sign_version, signature_over, signatures, signed_paths
from registry.version import is_name


@dataclass(frozen=True)
class PushResult:
    """A version on the Hub.

    Attributes:
        commit: 40 hex digits; what the tag names.
        branch: on which the commit is.
        url: a page that people can open.
        num_uploaded: files that the commit added or changed; 0 if everything was there.
        num_unchanged: files that were there already.
        is_signed: by `signer`, or by `bitsmith registry sign` before.
        is_all_signed: the signature speaks of every published file; that of `registry sign` does of the version's own
            files, and not of card, manifest (with the lineage) and report.
    """

    repo_id: str
    commit: str
    branch: str
    tag: str
    url: str
    num_uploaded: int
    num_unchanged: int
    is_signed: bool
    is_all_signed: bool


def push(
    registry: Registry,
    reference: str,
    repo_id: str,
    *,
    private: bool = False,
    branch: str = "main",
    tag: str | None = None,
    card: str | None = None,
    overview: Overview | None = None,
    signer: Signer | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    patience: Patience | None = None,
    progress: Progress = SILENT,
) -> PushResult:
    """Publish a version as `repo_id`.

    Run again, it sends only what is missing and ends in the same state. Files of the version published there
    before that this one lacks are removed in the same commit; other files are left alone.

    Args:
        reference: "name", "name:3" or "name@alias".
        private: make a new repository private; one that exists and is public is then refused.
        branch: made from the repository's first commit if it is missing.
        tag: by default v<number>, on another branch than main <branch>-v<number>.
        card: the text of README.md, with its YAML header. None leaves the page as it is.
        overview: how to make the page of main from all branches; only where `branch` is another.
        signer: a key or an identity that signs all published files, the card included. Without it, a signature of the
            version's own files that the registry has is published.
        endpoint, token: default to HF_ENDPOINT and to the login of `hf auth login` or HF_TOKEN.
        patience: with a busy server and lost races.
    Raises:
        HubAuthError, HubNotFoundError, HubUnavailableError: as the server answered.
        HubConflictError: the tag names other content, or the repository holds files and was not published by bitsmith,
            or (HubRaceError) others were faster every time.
        IntegrityError: a local file is damaged (nothing was sent), or one was damaged on the way (nothing moved).
        UnsafeFileError: a file of the version could be executed.
        RegistryError: the artifact has a README.md of its own and `card` was given too.
        InvalidNameError: `branch` or `tag` cannot be one.
        SignatureError: the key or the identity cannot sign. Nothing was sent.
    """
    version = registry.version(reference)
    tag = tag or (f"v{version.number}" if branch == "main" else f"{branch}-v{version.number}")
    for word, name in (("tag", tag), ("branch", branch)):
        if not is_name(name) or name.startswith(STAGING):
            raise InvalidNameError(f"{name!r} cannot be a {word}: expected letters, digits, '.', '-' or '_'.")
    publication = Publication.of(registry, version, card)
    publication = _signed(registry, str(version), publication, signer)
    target = _Target(publication, branch, tag, private, f"{version} by bitsmith", must_be_signed=signer is not None)
    patience = patience or Patience()

    def repository() -> AbstractContextManager[HubRepository]:
        return open_repository(repo_id, "write", registry.root / "pulls", endpoint, token)

    def attempt() -> tuple[PushResult, bytes]:
        with repository() as opened:
            return target.reach(opened, progress)

    def attempt_overview(overview: Overview) -> None:
        with repository() as opened:
            write_overview(opened, overview)

    result, manifest = patience.run(attempt, progress)
    record_publication(registry, version.digest, manifest, repo_id=repo_id, revision=tag, commit=result.commit)
    if overview is not None:
        patience.run(lambda: attempt_overview(overview), progress)
    return result


@dataclass(frozen=True)
class _Target:
    """What the repository shall hold; `reach` may be called again whatever it left."""

    publication: Publication
    branch: str
    tag: str
    private: bool
    message: str
    must_be_signed: bool

    @property
    def _key(self) -> str:
        return sha256_of({path: content.entry.sha256 for path, content in self.publication.contents.items()})

    def reach(self, repository: HubRepository, progress: Progress) -> tuple[PushResult, bytes]:
        """Also the manifest that lies there."""
        contents = self.publication.contents
        head = repository.create(self.private, self.branch)
        if self.branch != "main":
            check_main_is_free(repository)
        if tagged := repository.tags().get(self.tag):
            return self._found(repository, tagged)
        progress.say(f"Comparing {len(contents)} files with {repository.repo_id}.")
        remote = repository.files(head)
        changed = {path: content for path, content in contents.items() if not content.equals(remote.get(path))}
        stale = repository.stale_files(head, remote, contents)
        commit = head
        if changed or stale:
            progress.say(f"Sending {len(changed)} files to {repository.repo_id}.")
            expected = (set(remote) - set(stale)) | set(contents)
            commit = self._commit(repository, head, changed, stale, expected)
        else:  # a push may have been killed between its commit and the end of its staging branch
            repository.remove_staging(self._key)
        repository.tag(self.tag, commit)
        bundle = contents[SIGNATURE].read() if SIGNATURE in contents else None
        return self._result(repository, commit, len(changed), bundle), contents[MANIFEST].read()

    def _found(self, repository: HubRepository, tagged: str) -> tuple[PushResult, bytes]:
        """What the tag names already: the same version, and with the same signature if it is to be signed."""
        contents = self.publication.contents
        remote = repository.files(tagged)
        manifest = repository.published(tagged, remote, self.publication.manifest, contents)
        signature = remote.get(SIGNATURE)
        if manifest is None or (self.must_be_signed and not contents[SIGNATURE].equals(signature)):
            raise repository.tag_conflict(self.tag, tagged)
        bundle = repository.small_file(SIGNATURE, tagged, signature) if signature else None
        return self._result(repository, tagged, 0, bundle), manifest

    def _commit(
        self, repository: HubRepository, head: str, changed: Mapping[str, Content], stale: list[str], expected: set[str]
    ) -> str:
        contents, where = self.publication.contents, f"The branch {self.branch}"
        with repository.staging(head, self._key) as staging:
            tried = repository.commit(changed, stale, branch=staging, parent=head, message=self.message)
            repository.check(tried, contents, expected, where)
            commit = repository.commit(changed, stale, branch=self.branch, parent=head, message=self.message)
        repository.check(commit, contents, expected, "The commit is there, but the repository")
        return commit

    def _result(self, repository: HubRepository, commit: str, num_uploaded: int, bundle: bytes | None) -> PushResult:
        return PushResult(
            repository.repo_id,
            commit,
            self.branch,
            self.tag,
            repository.url(self.tag),
            num_uploaded,
            len(self.publication.contents) - num_uploaded,
            bundle is not None,
            bundle is not None and _speaks_of(bundle, set(self.publication.contents) - {SIGNATURE}),
        )


def _speaks_of(bundle: bytes, paths: set[str]) -> bool:
    try:
        return paths <= signed_paths(bundle)
    except SignatureError:  # somebody else's file of that name
        return False


def _signed(registry: Registry, reference: str, publication: Publication, signer: Signer | None) -> Publication:
    """With the signature that the registry has, or a new one: signing the same twice would give two commits."""
    digest, beside = publication.manifest.artifact.digest, publication.beside
    if signer is None:
        found = next((each for each in signatures(registry, digest) if set(each.files) == {SIGNATURE}), None)
    else:
        entries = {path: content.entry for path, content in beside.items()}
        found = signature_over(registry, digest, entries, signer) or sign_version(
            registry, reference, signer, beside={path: content.read() for path, content in beside.items()}
        )
    if found is None:
        return publication
    return publication.signed(Content(registry.path(found, SIGNATURE), found.files[SIGNATURE]))
