"""`pull`: a version from the Hub, of which nobody here sees anything before every byte and the signature were checked.

The reference is resolved to a commit online first, so that no cached answer stands in for a dead server; without the
network only what was pulled before is found again, and only if `offline` asks for it.
"""

import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from registry.artifact import Artifact, FileEntry
from registry.errors import HubConflictError, IntegrityError, NotFoundError, PinError, RegistryError, SignatureError
from registry.hub_repository import HubRepository, open_repository
from registry.lock import exclusive, held_if_free
from registry.patience import Patience
from registry.pins import Pin, read_pin, write_pin
from registry.progress import SILENT, Progress
from registry.publication import MANIFEST, REPORT_FOLDER, SIGNATURE, Manifest
from registry.publication_record import (
    find_publication,
    manifest_entry,
    record_publication,
    repositories_of,
)
from registry.registry import Registry
from registry.signer import Verifier
from registry.signing import KIND as SIGNATURE_KIND
from registry.signing import signatures, signed_paths, verify_artifact
from registry.version import Version, checked_name


@dataclass(frozen=True)
class PullResult:
    """A version that came from the Hub.

    Attributes:
        commit: 40 hex digits.
        manifest_sha256: of bitsmith-manifest.json.
        num_fetched, num_here: files that were downloaded, and that the registry had.
        is_signed: there is a signature, checked or not.
        is_verified: it is of the key or the identity that was asked for.
        is_report_left_out: report and lineage were published too, and not taken over, since nobody had signed them.
    """

    version: Version
    repo_id: str
    revision: str
    commit: str
    manifest_sha256: str
    num_fetched: int
    num_here: int
    is_signed: bool
    is_verified: bool
    is_report_left_out: bool


def pull(
    repo_id: str,
    registry: Registry,
    *,
    name: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    verifier: Verifier | None = None,
    lock_file: Path | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    patience: Patience | None = None,
    progress: Progress = SILENT,
) -> PullResult:
    """Bring a version from the Hub into `registry`, with its report and its lineage.

    Files that the manifest does not list are never fetched; files that the registry has are not fetched again. Files
    that were finished, and the beginning of the one that was not, are kept from an attempt that failed.

    Args:
        name: to publish it under; by default the last part of `repo_id`, or what the lock file says.
        revision: branch, tag or commit; by default the head of main.
        offline: ask nobody; find the version that was pulled from there (and from `revision`) before, and check it.
        verifier: a key or an identity; without its signature over exactly these files nothing is published here.
        lock_file: where it pins the repository, that commit and manifest or nothing; otherwise it is pinned there now.
        patience: with a busy server.
    Raises:
        NotPublishedError: the repository has no manifest.
        IntegrityError: a file is not what the manifest says. Nothing was published here.
        SignatureError: see `verifier`. Nothing was published here.
        UnsafePathError, UnsafeFileError: the manifest names a file outside its folder, or one that could be executed.
        InvalidDescriptionError: the manifest cannot be read.
        PinError: the lock file pins another revision or manifest.
        NotFoundError: `offline`, and it is not here.
        HubConflictError: `name` was left out, and the versions of that name here are another repository's.
        HubAuthError, HubNotFoundError, HubUnavailableError: as the server answered.
    """
    if verifier:
        verifier.check()
    pin = read_pin(lock_file, repo_id) if lock_file else None
    asked_name = name and checked_name(name)
    name = registry.checked_name(name or (pin.name if pin else repo_id.rsplit("/", 1)[-1]))
    if pin and revision and revision not in (pin.revision, pin.commit):
        raise PinError(
            f"{lock_file} pins {repo_id} at {pin.revision} (commit {pin.commit[:12]}), and {revision} was asked for. "
            "Remove its entry to pin another, or leave the revision out."
        )
    result = None
    if offline or pin:
        result = _from_here(registry, repo_id, name if pin else asked_name, revision, pin, verifier, offline)
    if result is None and offline:
        at = f" at {pin.commit if pin else revision}" if pin or revision else ""
        raise NotFoundError(
            f"{repo_id}{at} was not pulled into this registry before, and --offline asks nobody. "
            "Run the same command once with the network."
        )
    if result is None:
        if not asked_name and not pin:
            _check_owner(registry, name, repo_id)
        pulling = _Pulling(registry, repo_id, name, revision, pin, verifier, progress)

        def attempt() -> PullResult:
            with open_repository(repo_id, "read", registry.root / "pulls", endpoint, token) as repository:
                return pulling.run(repository)

        result = (patience or Patience()).run(attempt, progress)
    if lock_file and not pin:
        new = Pin(result.version.name, result.revision, result.commit, result.manifest_sha256)
        write_pin(lock_file, repo_id, new)
    return result


def _check_owner(registry: Registry, name: str, repo_id: str) -> None:
    """Two owners may have repositories of one last name: nobody's version is to follow on another's unasked."""
    places = repositories_of(registry, name)
    if places and repo_id not in places:
        raise HubConflictError(
            f"The versions of {name} here are those of {', '.join(sorted(places)[:3])}, and {repo_id} would become the "
            f"next. Nothing was fetched. Choose another name with --name, or --name {name} if that is what you want."
        )


def _from_here(
    registry: Registry,
    repo_id: str,
    name: str | None,
    revision: str | None,
    pin: Pin | None,
    verifier: Verifier | None,
    offline: bool,
) -> PullResult | None:
    """What was pulled before, if all of it is here and sound."""
    if pin:
        found = find_publication(registry, repo_id, commit=pin.commit)
    else:
        found = find_publication(registry, repo_id, revision=revision) or (
            find_publication(registry, repo_id, commit=revision) if revision else None
        )
    if found is None:
        return None
    version, record = found
    manifest_sha256 = manifest_entry(record).sha256
    recorded = Manifest.from_json(registry.path(record, MANIFEST).read_bytes())
    if recorded.artifact.digest != version.digest:
        raise IntegrityError(
            f"The note that {version} was pulled from {repo_id}", version.digest, recorded.artifact.digest
        )
    if pin and manifest_sha256 != pin.manifest_sha256:
        return None  # let the server say what is there
    if pin and not verifier:
        _check_pinned_report(version, recorded)
    verification = registry.verify(str(version))
    if pin and not verification.ok and not offline:
        return None  # to be fetched again
    verification.raise_if_damaged()
    signed = signatures(registry, version.digest)
    if verifier:
        covering = [each for each in signed if _speaks_of_report(registry, version, each)]
        asked = covering or signed  # a version signed here too has one that says nothing of the report
        signature = verify_artifact(registry, registry.get(version.digest), verifier, str(version), asked)
        _check_report(registry, version, signature)
    if name and name != version.name:
        report = registry.get(version.report_digest) if version.report_digest else None
        version = registry.publish(name, registry.get(version.digest), report, version.note)
    return PullResult(
        version,
        repo_id,
        record.metadata["revision"],
        record.metadata["commit"],
        manifest_sha256,
        0,
        verification.num_files,
        bool(signed),
        bool(verifier),
        bool(verifier) and version.report_digest is None and recorded.report is not None,
    )


def _check_pinned_report(version: Version, pinned: Manifest) -> None:
    """Raises PinError where the same version was published here before with another report, which stays its own."""
    if version.report_digest != (pinned.report.digest if pinned.report else None):
        raise PinError(
            f"{version} is here already with another report than the lock file pins. Its own files are right. Pull it "
            "under another name (--name) to have the pinned report."
        )


def _speaks_of_report(registry: Registry, version: Version, signature: Artifact) -> bool:
    report = registry.get(version.report_digest) if version.report_digest else None
    signed = {path.removeprefix(f"{REPORT_FOLDER}/"): entry for path, entry in signature.files.items()}
    return report is None or report.files.items() <= signed.items()


def _check_report(registry: Registry, version: Version, signature: Artifact) -> None:
    """Raises SignatureError where the version was published here before, unchecked, with a report nobody signed."""
    if not _speaks_of_report(registry, version, signature):
        raise SignatureError(
            f"{version} is here already, from a pull or an import that checked no signature, with a report that the "
            "signature does not speak of. Its own files are right. Pull it under another name (--name) to have only "
            "what was signed."
        )


@dataclass(frozen=True)
class _Pulling:
    """One pull; `run` may be called again whatever it left."""

    registry: Registry
    repo_id: str
    name: str
    revision: str | None
    pin: Pin | None
    verifier: Verifier | None
    progress: Progress

    def run(self, repository: HubRepository) -> PullResult:
        commit = repository.resolve(self.pin.commit if self.pin else self.revision)
        remote = repository.files(commit)
        manifest, text = repository.manifest(commit, remote)
        entry = FileEntry.of_bytes(text)
        if self.pin and entry.sha256 != self.pin.manifest_sha256:
            raise PinError(
                f"{self.repo_id} has another manifest at commit {commit[:12]} (sha256 {entry.sha256[:12]}…) than the "
                f"lock file pins (sha256 {self.pin.manifest_sha256[:12]}…). Nothing was fetched. Its history was "
                "rewritten: ask its owner why, and remove the entry only if you trust the answer."
            )
        repository.check_listing(manifest, remote)
        bundle = repository.small_file(SIGNATURE, commit, remote[SIGNATURE]) if SIGNATURE in remote else None
        is_report_left_out = False
        if self.verifier and bundle is not None and not self._needed_paths(manifest) <= signed_paths(bundle):
            is_report_left_out = manifest.report is not None or bool(manifest.lineage)
            manifest = replace(manifest, report=None, lineage=())  # nobody has signed these
        with self.registry.adding():
            num_fetched = self._fetch(repository, commit, manifest)
            revision = self.pin.revision if self.pin else self.revision or "main"
            found = [self._signature(manifest, text, bundle)] if bundle is not None else []
            signature = None
            if self.verifier:
                what = f"{self.repo_id} at {revision}"
                signature = verify_artifact(self.registry, manifest.artifact, self.verifier, what, found)
            self._record(manifest, found)
            note = f"pulled from {self.repo_id} at {commit}"
            version = self.registry.publish(self.name, manifest.artifact, manifest.report, note)
            if self.pin and not self.verifier:
                _check_pinned_report(version, manifest)
            if signature:
                _check_report(self.registry, version, signature)
            record_publication(
                self.registry, manifest.artifact.digest, text, repo_id=self.repo_id, revision=revision, commit=commit
            )
        num_here = len(manifest.files) - num_fetched
        return PullResult(
            version,
            self.repo_id,
            revision,
            commit,
            entry.sha256,
            num_fetched,
            num_here,
            bundle is not None,
            bool(self.verifier),
            is_report_left_out,
        )

    def _needed_paths(self, manifest: Manifest) -> set[str]:
        """Of what a signature must speak, for the report and what the version was made from to be believed."""
        report = manifest.report.files if manifest.report else ()
        return {MANIFEST, *(f"{REPORT_FOLDER}/{path}" for path in report)}

    def _fetch(self, repository: HubRepository, commit: str, manifest: Manifest) -> int:
        """Get what is missing into the store, where nothing names it yet; how many files that were."""
        wanted = {path: entry for path, entry in manifest.files.items() if not self.registry.store.is_sound(entry)}
        self._check_space(wanted)
        for path, entry in self.progress.track(wanted.items(), f"pull {self.repo_id}", len(wanted)):
            with exclusive(
                repository.downloads / f"{entry.sha256}.lock",
                lambda path=path: self.progress.say(f"Waiting for another process that is fetching {path}."),  # type: ignore[misc]
            ):
                if not self.registry.store.is_sound(entry):
                    self.registry.store.adopt(repository.fetch(path, commit, entry), entry)
        for lock in repository.downloads.glob("*.lock"):  # of attempts that were killed
            with held_if_free(lock):
                pass
        return len(wanted)

    def _check_space(self, wanted: Mapping[str, FileEntry]) -> None:
        needed = sum(self._missing_bytes(entry) for entry in set(wanted.values()))
        free = shutil.disk_usage(self.registry.root).free
        if needed > free:
            raise RegistryError(
                f"{self.repo_id} needs {needed:,} bytes, and {self.registry.root} has {free:,} free. Nothing was "
                "fetched. Free some space, or point BITSMITH_HOME at a larger disk."
            )

    def _missing_bytes(self, entry: FileEntry) -> int:
        part = self.registry.root / "pulls" / f"{entry.sha256}.part"
        return entry.size_bytes - min(part.stat().st_size if part.exists() else 0, entry.size_bytes)

    def _record(self, manifest: Manifest, found: list[Artifact]) -> None:
        """Enter all descriptions and signatures, which nobody finds before a version names them."""
        for artifact in manifest.lineage:
            self.registry.remember(artifact)
        for artifact in filter(None, (manifest.artifact, manifest.report, *found)):
            self.registry.record(artifact)

    def _signature(self, manifest: Manifest, text: bytes, bundle: bytes) -> Artifact:
        """Together with whatever else was published and it speaks of; its files are in the store."""
        entries = {path: FileEntry.of_bytes(content) for path, content in ((MANIFEST, text), (SIGNATURE, bundle))}
        for path, content in ((MANIFEST, text), (SIGNATURE, bundle)):
            self.registry.store.receive(io.BytesIO(content), entries[path], path)
        beside = {path: entry for path, entry in manifest.files.items() if path not in manifest.artifact.files}
        spoken_of = {*signed_paths(bundle), SIGNATURE}
        files = {path: entry for path, entry in (beside | entries).items() if path in spoken_of}
        return Artifact.create(SIGNATURE_KIND, files, [manifest.artifact.digest])
