"""Signatures over all files of a version, in the OpenSSF's format (model-signing), with elliptic-curve keys: offline.

A signature is an artifact of kind "signature" whose parent is the signed one:

    model.sig      a Sigstore bundle: an in-toto statement with the sha256 of every file, and its signature
    ...            what was signed with the version's files: in a publication the card, the manifest and the report

It holds for the content, under whatever name and number. `model-signing verify key` reads it too, beside the files.
"""

import base64
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from registry.artifact import Artifact, FileEntry
from registry.errors import RegistryError, SignatureError
from registry.registry import Registry
from registry.store import disk_errors

KIND = "signature"
FILE = "model.sig"


def sign_version(
    registry: Registry,
    reference: str,
    private_key: Path,
    *,
    password: str | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> Artifact:
    """Sign a version with a private key in PEM (P-256, P-384 or P-521), after checking every file's hash.

    Args:
        beside: more files to sign together with the version's, by their path in the same folder.
    Raises:
        SignatureError: the key cannot be read or used.
        IntegrityError: a file of the version is damaged.
    """
    from cryptography.exceptions import UnsupportedAlgorithm

    signing, _ = _model_signing()
    registry.verify(reference).raise_if_damaged()
    artifact = registry.get(registry.version(reference).digest)
    try:
        with disk_errors(private_key):
            private_key.read_bytes()
        secret = password.encode() if password else None  # annotated as text, used as bytes
        config = signing.Config().use_elliptic_key_signer(private_key=private_key, password=secret)
    except (ValueError, TypeError, AttributeError, UnsupportedAlgorithm) as error:
        raise SignatureError(
            f"{private_key} is not a private key that can sign ({error}). Expected an elliptic-curve key in PEM, such "
            "as `openssl ecparam -name prime256v1 -genkey -noout -out key.pem` writes, and its password if it has one."
        ) from error
    with _scratch(registry) as folder:
        model, out = folder / "model", folder / "out"  # the first name stands in the statement
        _lay_out(registry, artifact, model)
        for path, content in (beside or {}).items():
            for place in (model / path, out / path):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
        out.mkdir(exist_ok=True)
        config.sign(model, out / FILE)
        return registry.add_artifact(KIND, out, [artifact.digest])


def signatures(registry: Registry, digest: str) -> list[Artifact]:
    """All signatures of the artifact."""
    return [child for child in registry.children(digest) if child.kind == KIND]


def signature_over(
    registry: Registry, digest: str, beside: Mapping[str, FileEntry], private_key: Path, *, password: str | None = None
) -> Artifact | None:
    """The signature that `private_key` made over the artifact and exactly these files beside it, if there is one."""
    candidates = [
        each for each in signatures(registry, digest) if {p: e for p, e in each.files.items() if p != FILE} == beside
    ]
    if not candidates:
        return None
    with _scratch(registry) as folder:
        public_key = folder / "public.pem"
        public_key.write_bytes(_public_half(private_key, password))
        held = (each for each in candidates if _why_it_fails(registry, registry.get(digest), each, public_key) is None)
        return next(held, None)


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


def verify_signature(registry: Registry, reference: str, public_key: Path) -> Artifact:
    """The signature of the version that `public_key` made, over exactly the files that are here.

    Raises:
        SignatureError: there is none, or it is over other files, or the key cannot be read.
    """
    version = registry.version(reference)
    found = signatures(registry, version.digest)
    return verify_artifact(registry, registry.get(version.digest), public_key, str(version), found)


def verify_artifact(
    registry: Registry, artifact: Artifact, public_key: Path, what: str, found: list[Artifact]
) -> Artifact:
    """As `verify_signature`, for an artifact that may not be recorded yet.

    Args:
        what: its name in an error.
        found: the signatures to try.
    """
    _, verifying = _model_signing()
    with disk_errors(public_key):
        public_key.read_bytes()
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (ValueError, TypeError, AttributeError) as error:
        raise SignatureError(f"{public_key} is not a public key in PEM of an elliptic curve ({error}).") from error
    reasons = []
    for signature in found:
        why = _why_it_fails(registry, artifact, signature, public_key)
        if why is None:
            return signature
        reasons.append(why)
    why = f"it has {len(found)}, and none holds: {'; '.join(reasons)}" if found else "it has none"
    raise SignatureError(
        f"{what} has no signature of {public_key}: {why}. Ask the one who has the private key to sign it "
        "(`bitsmith registry sign`, or `bitsmith push --sign-key`), or give the right public key."
    )


def _why_it_fails(registry: Registry, artifact: Artifact, signature: Artifact, public_key: Path) -> str | None:
    """None if it holds."""
    _, verifying = _model_signing()
    beside = {path: entry for path, entry in signature.files.items() if path != FILE}
    if FILE not in signature.files or set(beside) & set(artifact.files):
        return "it is no signature of this version"
    try:
        spoken_of = signed_paths(registry.path(signature, FILE).read_bytes())
    except SignatureError as error:
        return str(error)
    if unspoken := sorted({*artifact.files, *beside} - spoken_of):
        return f"it leaves out {unspoken[0]}"
    with _scratch(registry) as folder:
        _lay_out(registry, artifact, folder / "model")
        _lay_out(registry, Artifact.create("beside", beside), folder / "model")
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        try:
            config.verify(folder / "model", registry.path(signature, FILE))
        except RegistryError:
            raise
        except Exception as error:  # whatever a foreign file makes the parser raise, it is no signature
            return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def _public_half(private_key: Path, password: str | None) -> bytes:
    from cryptography.hazmat.primitives import serialization

    with disk_errors(private_key):
        content = private_key.read_bytes()
    try:
        key = serialization.load_pem_private_key(content, password.encode() if password else None)
    except (ValueError, TypeError) as error:
        raise SignatureError(f"{private_key} cannot be read as a private key ({error}).") from error
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@contextmanager
def _scratch(registry: Registry) -> Iterator[Path]:
    place = registry.root if os.access(registry.root, os.W_OK) else None  # None: the system's, for copies
    with disk_errors(registry.root), tempfile.TemporaryDirectory(dir=place, prefix="signing-") as folder:
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


def _model_signing():
    try:
        from model_signing import signing, verifying
    except ImportError as error:
        raise RegistryError(
            f"Signatures need {error.name}. Install it with `pip install 'bitsmith[signing]'`."
        ) from error
    return signing, verifying
