"""A signature holds for exactly the files that were signed, with exactly that key, and outlives a collection."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from registry import (
    Artifact,
    IntegrityError,
    KeySigner,
    KeyVerifier,
    Registry,
    RegistryError,
    SignatureError,
    export_version,
    import_version,
    sign_version,
    signatures,
    verify_signature,
)
from tests.keys import write_keys

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "key", ec.SECP256R1())


@pytest.fixture
def published(registry: Registry, checkpoint: Artifact) -> Artifact:
    registry.publish("model", checkpoint)
    return checkpoint


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_a_signature_is_verified_with_its_key_alone(
    curve: ec.EllipticCurve, registry: Registry, published: Artifact, tmp_path: Path
) -> None:
    private, public = write_keys(tmp_path, "mine", curve)
    _, foreign = write_keys(tmp_path, "foreign", curve)
    with pytest.raises(SignatureError, match="it has none"):
        verify_signature(registry, "model", KeyVerifier(public))
    signature = sign_version(registry, "model", KeySigner(private))
    assert verify_signature(registry, "model@latest", KeyVerifier(public)) == signature
    assert signature.parents == (published.digest,)
    assert signatures(registry, published.digest) == [signature]
    with pytest.raises(SignatureError, match="none holds"):
        verify_signature(registry, "model", KeyVerifier(foreign))


def test_what_is_signed_is_what_was_read_whatever_becomes_the_latest_meanwhile(
    registry: Registry, published: Artifact, make_folder, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = Registry.verify

    def slow(self: Registry, reference: str, **options):
        found = verify(self, reference, **options)
        self.publish("model", self.add_artifact("checkpoint", make_folder({"config.json": b"{}"})))
        return found

    monkeypatch.setattr(Registry, "verify", slow)
    assert sign_version(registry, "model", KeySigner(keys[0])).parents == (published.digest,)


def test_a_signature_that_cannot_lie_beside_the_files_hides_no_other(
    registry: Registry, published: Artifact, make_folder, keys: tuple[Path, Path]
) -> None:
    genuine = sign_version(registry, "model", KeySigner(keys[0]))
    bundle = registry.path(genuine, "model.sig").read_bytes()
    for number in range(8):  # one of them has a digest before the genuine one's
        files = {"model.sig": bundle, "config.json/y": bytes([number])}
        registry.add_artifact("signature", make_folder(files), [published.digest])
    assert verify_signature(registry, "model", KeyVerifier(keys[1])) == genuine


def test_the_statement_names_every_file(registry: Registry, published: Artifact, keys: tuple[Path, Path]) -> None:
    signature = sign_version(registry, "model", KeySigner(keys[0]))
    bundle = json.loads(registry.path(signature, "model.sig").read_bytes())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    signed = {each["name"]: each["digest"] for each in statement["predicate"]["resources"]}
    assert signed == {path: entry.sha256 for path, entry in published.files.items()}


def test_the_tool_of_the_openssf_reads_it(
    registry: Registry, published: Artifact, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    signature = sign_version(registry, "model", KeySigner(keys[0]))
    registry.materialize(published, tmp_path / "model")
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(tmp_path / "model")]
    command += ["--signature", str(registry.path(signature, "model.sig")), "--public_key", str(keys[1])]
    assert subprocess.run(command, check=False).returncode == 0
    (tmp_path / "model" / "config.json").write_bytes(b"{}")
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0


def test_another_version_does_not_take_the_signature(
    registry: Registry, published: Artifact, keys: tuple[Path, Path], make_folder
) -> None:
    """A signature that is attached to other files is of no use."""
    signature = sign_version(registry, "model", KeySigner(keys[0]))
    content = registry.path(signature, "model.sig").read_bytes()
    other = registry.add_artifact("checkpoint", make_folder({"config.json": b"evil"}))
    registry.publish("other", other)
    registry.add_artifact("signature", make_folder({"model.sig": content}), [other.digest])
    with pytest.raises(SignatureError, match="none holds"):
        verify_signature(registry, "other", KeyVerifier(keys[1]))


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"null", b"\xff" * 100, b'{"dsseEnvelope": 1}'])
def test_what_is_no_signature_is_refused(
    content: bytes, registry: Registry, published: Artifact, keys: tuple[Path, Path], make_folder
) -> None:
    registry.add_artifact("signature", make_folder({"model.sig": content, "x": b""}), [published.digest])
    with pytest.raises(SignatureError, match="none holds"):
        verify_signature(registry, "model", KeyVerifier(keys[1]))


def test_damage_is_never_signed_nor_verified(registry: Registry, published: Artifact, keys: tuple[Path, Path]) -> None:
    sign_version(registry, "model", KeySigner(keys[0]))
    blob = registry.path(published, "config.json")
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes().replace(b"64", b"65"))
    with pytest.raises(SignatureError, match="none holds"):
        verify_signature(registry, "model", KeyVerifier(keys[1]))
    with pytest.raises(IntegrityError):
        sign_version(registry, "model", KeySigner(keys[0]))


def test_keys_that_cannot_be_used_are_named(registry: Registry, published: Artifact, tmp_path: Path) -> None:
    secret, public = write_keys(tmp_path, "secret", ec.SECP256R1(), b"word")
    for password in (None, "wrong"):
        with pytest.raises(SignatureError, match=r"secret\.pem is not a private key"):
            sign_version(registry, "model", KeySigner(secret, password))
    sign_version(registry, "model", KeySigner(secret, "word"))
    assert verify_signature(registry, "model", KeyVerifier(public))
    (tmp_path / "text.pem").write_text("no key")
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (tmp_path / "rsa.pem").write_bytes(other.private_bytes(PEM, PKCS8, serialization.NoEncryption()))
    for name in ("text.pem", "rsa.pem", "secret.pub"):
        with pytest.raises(SignatureError, match=name):
            sign_version(registry, "model", KeySigner(tmp_path / name))
    for name in ("text.pem", "rsa.pem"):
        with pytest.raises(SignatureError, match=name):
            verify_signature(registry, "model", KeyVerifier(tmp_path / name))
    with pytest.raises(RegistryError, match="absent"):
        sign_version(registry, "model", KeySigner(tmp_path / "absent.pem"))


def test_a_collection_keeps_signatures_of_what_it_keeps(
    registry: Registry, published: Artifact, keys: tuple[Path, Path], make_folder
) -> None:
    signature = sign_version(registry, "model", KeySigner(keys[0]))
    garbage = registry.add_artifact("checkpoint", make_folder({"a": b"garbage"}))
    orphan = registry.add_artifact("signature", make_folder({"model.sig": b"x"}), [garbage.digest])
    registry._uses.close()
    collected = registry.collect_garbage(grace_seconds=-5)
    assert set(collected.artifacts) == {garbage, orphan}
    assert verify_signature(registry, "model", KeyVerifier(keys[1])) == signature
    assert [path for path in registry.root.iterdir() if path.name.startswith("signing-")] == []


def test_a_signature_goes_along_with_an_export(
    registry: Registry, published: Artifact, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    sign_version(registry, "model", KeySigner(keys[0]))
    other = Registry(tmp_path / "other")
    import_version(other, export_version(registry, "model", tmp_path / "model.tar").path)
    assert verify_signature(other, "model", KeyVerifier(keys[1]))
