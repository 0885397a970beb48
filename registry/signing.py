"""Signatures over all files of a version, in the OpenSSF's format (model-signing), with a key or by an identity.

A signature is an artifact of kind "signature" whose parent is the signed one:

    model.sig      a Sigstore bundle: an in-toto statement with the sha256 of every file, and its signature
    ...            what was signed with the version's files: in a publication the card, the manifest and the report

It holds for the content, under whatever name and number. `model_signing verify` reads it too, beside the files.
"""

import base64
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from registry.artifact import Artifact, FileEntry
from registry.errors import RegistryError, SignatureError, UnsafePathError
from registry.registry import Registry
from registry.signer import Signer, Verifier
from registry.store import disk_errors

KIND = "signature"
FILE = "model.sig"


def sign_version(
    registry: Registry, reference: str, signer: Signer, *, beside: Mapping[str, bytes] | None = None
) -> Artifact:
    """Sign a version, after checking every file's hash.

    Args:
        beside: more files to sign together with the version's, by their path in the same folder.
    Raises:
        SignatureError: the key or the identity cannot sign.
        IntegrityError: a file of the version is damaged.
    """
    signer.check()
    version = registry.version(reference)  # once: another one may be the latest by the time that this one is read
    registry.verify(str(version)).raise_if_damaged()
    artifact = registry.get(version.digest)
    with _scratch(registry) as folder:
        model, out = folder / "model", folder / "out"  # the first name stands in the statement
        _lay_out(registry, artifact, model)
        for path, content in (beside or {}).items():
            for place in (model / path, out / path):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
        out.mkdir(exist_ok=True)
        signer.sign(model, out / FILE)
        return registry.add_artifact(KIND, out, [artifact.digest])


def signatures(registry: Registry, digest: str) -> list[Artifact]:
    """All signatures of the artifact."""
    return [child for child in registry.children(digest) if child.kind == KIND]


def signature_over(registry: Registry, digest: str, beside: Mapping[str, FileEntry], signer: Signer) -> Artifact | None:
    """The signature that `signer` made over the artifact and exactly these files beside it, if there is one."""
    candidates = [
        each
        for each in signatures(registry, digest)
        if {path: entry for path, entry in each.files.items() if path != FILE} == beside
        and _is_keyless(registry, each) == signer.is_keyless
    ]
    if not candidates:
        return None
    artifact = registry.get(digest)
    with _scratch(registry) as folder:
        for verifier in signer.verifiers(folder):
            for each in candidates:
                if _why_it_fails(registry, artifact, each, verifier) is None:
                    return each
    return None


def signed_paths(bundle: bytes) -> set[str]:
    """The files that a model.sig speaks of.

    Raises:
        SignatureError: it is no such file.
    """
    try:
        statement = json.loads(base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"]))
        return {str(resource["name"]) for resource in statement["predicate"]["resources"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SignatureError(
            f"{FILE} is not a signature in the OpenSSF's format ({type(error).__name__}: {error}). It was damaged, or "
            "made by another tool. Ask its publisher to sign the version again."
        ) from error


def verify_signature(registry: Registry, reference: str, verifier: Verifier) -> Artifact:
    """The signature of the version that `verifier` asks for, over exactly the files that are here.

    Raises:
        SignatureError: there is none, or it is over other files, or nothing can be verified.
    """
    version = registry.version(reference)
    found = signatures(registry, version.digest)
    return verify_artifact(registry, registry.get(version.digest), verifier, str(version), found)


def verify_artifact(
    registry: Registry, artifact: Artifact, verifier: Verifier, what: str, found: list[Artifact]
) -> Artifact:
    """As `verify_signature`, for an artifact that may not be recorded yet.

    Args:
        what: its name in an error.
        found: the signatures to try.
    """
    verifier.check()
    reasons = []
    for signature in found:
        why = _why_it_fails(registry, artifact, signature, verifier)
        if why is None:
            return signature
        reasons.append(why)
    why = f"it has {len(found)}, and none holds: {'; '.join(reasons)}" if found else "it has none"
    raise SignatureError(f"{what} has no signature of {verifier}: {why}. {verifier.advice}")


def _why_it_fails(registry: Registry, artifact: Artifact, signature: Artifact, verifier: Verifier) -> str | None:
    """None if it holds."""
    beside = {path: entry for path, entry in signature.files.items() if path != FILE}
    if FILE not in signature.files or set(beside) & set(artifact.files):
        return "it is no signature of this version"
    try:
        Artifact.create("signed", {**artifact.files, **beside})
    except UnsafePathError:  # a file of one where the other has a folder
        return "it is no signature of this version"
    bundle = registry.path(signature, FILE)
    try:
        spoken_of = signed_paths(bundle.read_bytes())
    except SignatureError as error:
        return str(error)
    if _is_keyless(registry, signature) != verifier.is_keyless:
        return "it is of a key, not of an identity" if verifier.is_keyless else "it is of an identity, not of a key"
    if unspoken := sorted({*artifact.files, *beside} - spoken_of):
        return f"it leaves out {unspoken[0]}"
    with _scratch(registry) as folder:
        _lay_out(registry, artifact, folder / "model")
        _lay_out(registry, Artifact.create("beside", beside), folder / "model")
        try:
            verifier.verify(folder / "model", bundle)
        except RegistryError:
            raise
        except Exception as error:  # whatever a foreign file makes the parser raise, it is no signature
            return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def _is_keyless(registry: Registry, signature: Artifact) -> bool:
    """Does its bundle hold a certificate, which names an identity, in place of the hash of a key?"""
    try:
        return "publicKey" not in json.loads(registry.path(signature, FILE).read_bytes())["verificationMaterial"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


@contextmanager
def _scratch(registry: Registry) -> Iterator[Path]:
    place = registry.root if os.access(registry.root, os.W_OK) else None  # None: the system's, for copies
    # nobody collects meanwhile; where nobody can write, nobody can
    with (
        registry.adding() if place else nullcontext(),
        disk_errors(registry.root),
        tempfile.TemporaryDirectory(dir=place, prefix="signing-") as folder,
    ):
        yield Path(folder)


def _lay_out(registry: Registry, artifact: Artifact, folder: Path) -> None:
    """The artifact's files under their names, as links to the blobs where the file system has them; only to read."""
    for path in artifact.files:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        blob = registry.path(artifact, path)
        try:
            os.link(blob, target)
        except FileExistsError:
            raise
        except OSError:
            with blob.open("rb") as reader, target.open("xb") as writer:
                shutil.copyfileobj(reader, writer)
