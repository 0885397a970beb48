"""Signatures over all files of a version, in the OpenSSF's format (model-signing), with elliptic-curve keys: offline.

A signature is an artifact of kind "signature" whose parent is the signed one:

    model.sig      a Sigstore bundle: an in-toto statement with the sha256 of every file, and its signature

It holds for the content, under whatever name and number. `model-signing verify key` reads it too, beside the files.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.artifact import Artifact
from registry.errors import RegistryError, SignatureError
from registry.registry import Registry
from registry.store import disk_errors

KIND = "signature"
FILE = "model.sig"


def sign_version(registry: Registry, reference: str, private_key: Path, *, password: str | None = None) -> Artifact:
    """Sign a version with a private key in PEM (P-256, P-384 or P-521), after checking every file's hash.

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
    with _as_folder(registry, artifact) as folder:
        out = folder.parent / "out"
        out.mkdir()
        config.sign(folder, out / FILE)
        return registry.add_artifact(KIND, out, [artifact.digest])


def signatures(registry: Registry, digest: str) -> list[Artifact]:
    """All signatures of the artifact."""
    return [child for child in registry.children(digest) if child.kind == KIND]


def verify_signature(registry: Registry, reference: str, public_key: Path) -> Artifact:
    """The signature of the version that `public_key` made, over exactly the files that are here.

    Raises:
        SignatureError: there is none, or it is over other files, or the key cannot be read.
    """
    _, verifying = _model_signing()
    version = registry.version(reference)
    artifact = registry.get(version.digest)
    with disk_errors(public_key):
        public_key.read_bytes()
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (ValueError, TypeError, AttributeError) as error:
        raise SignatureError(f"{public_key} is not a public key in PEM of an elliptic curve ({error}).") from error
    found = signatures(registry, artifact.digest)
    reasons = []
    with _as_folder(registry, artifact) as folder:
        for signature in found:
            config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
            try:
                config.verify(folder, registry.path(signature, FILE))
            except Exception as error:  # whatever a foreign file makes the parser raise, it is no signature
                reasons.append(" ".join(str(error).split())[:200] or type(error).__name__)
                continue
            return signature
    why = f"it has {len(found)}, and none holds: {'; '.join(reasons)}" if found else "it has none"
    raise SignatureError(
        f"{version} has no signature of {public_key}: {why}. Ask the one who has the private key for "
        f"`bitsmith registry sign {version} --key KEY`, or give the right public key."
    )


@contextmanager
def _as_folder(registry: Registry, artifact: Artifact) -> Iterator[Path]:
    """The artifact's files under their names, as links to the blobs where the file system has them; only to read."""
    place = registry.root if os.access(registry.root, os.W_OK) else None  # None: the system's, for copies
    with disk_errors(registry.root), tempfile.TemporaryDirectory(dir=place, prefix="signing-") as scratch:
        folder = Path(scratch) / "model"  # the name stands in the statement
        for path in artifact.files:
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            blob = registry.path(artifact, path)
            try:
                os.link(blob, target)
            except OSError:
                shutil.copyfile(blob, target)
        yield folder


def _model_signing():
    try:
        from model_signing import signing, verifying
    except ImportError as error:
        raise RegistryError(
            f"Signatures need {error.name}. Install it with `pip install 'bitsmith[signing]'`."
        ) from error
    return signing, verifying
