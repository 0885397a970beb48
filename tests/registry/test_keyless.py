"""Keyless signatures, made and checked by Sigstore's own client against a private instance of it."""

import base64
import json
import logging
import os
import re
import subprocess
import sys
import traceback
import urllib.request
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from registry import (
    Artifact,
    IdentityVerifier,
    IntegrityError,
    KeylessSigner,
    KeySigner,
    KeyVerifier,
    Registry,
    RegistryError,
    SignatureError,
    Version,
    export_version,
    import_version,
    sign_version,
    signatures,
    verify_signature,
)
from registry.artifact import FileEntry
from registry.publication import SIGNATURE
from registry.signing import verify_artifact

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from keys import write_keys
from sigstore_server import GITHUB, JOB_SECRET, SigstoreServer

ALICE, BOB = "alice@example.com", "bob@example.com"
SIGN = [sys.executable, "-m", "pipeline", "registry", "sign", "tiny", "--keyless"]
WORKFLOW = "https://github.com/alice/models/.github/workflows/publish.yml@refs/heads/main"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def bundle_of(registry: Registry, signature: Artifact) -> dict:
    return json.loads(registry.path(signature, SIGNATURE).read_bytes())


# Signing and verifying


def test_a_signature_holds_for_its_identity_and_issuer_alone(
    registry, version, sigstore, trust, alice, is_alice
) -> None:
    with pytest.raises(SignatureError, match="it has none"):
        verify_signature(registry, "tiny", is_alice)
    signature = sign_version(registry, "tiny", alice)
    assert verify_signature(registry, "tiny", is_alice) == signature
    assert signature.parents == (version.digest,)
    with pytest.raises(SignatureError, match=r"bob@example.com .* none holds: .*alice@example.com"):
        verify_signature(registry, "tiny", IdentityVerifier(BOB, sigstore.issuer, trust))
    with pytest.raises(
        SignatureError, match=f"none holds: .*got '{sigstore.issuer}', expected '{sigstore.other_issuer}'"
    ):
        verify_signature(registry, "tiny", IdentityVerifier(ALICE, sigstore.other_issuer, trust))


def test_another_issuer_vouches_for_another_alice(registry, version, sigstore, trust, is_alice) -> None:
    sign_version(registry, "tiny", KeylessSigner(sigstore.token(ALICE, iss=sigstore.other_issuer), trust))
    with pytest.raises(SignatureError, match="none holds"):
        verify_signature(registry, "tiny", is_alice)
    assert verify_signature(registry, "tiny", IdentityVerifier(ALICE, sigstore.other_issuer, trust))


def test_another_instance_is_not_believed(registry, version, sigstore, alice, tmp_path) -> None:
    sign_version(registry, "tiny", alice)
    with SigstoreServer() as other:
        theirs = other.write_trust_config(tmp_path / "theirs.json")
    with pytest.raises(SignatureError, match="certificate chain"):
        verify_signature(registry, "tiny", IdentityVerifier(ALICE, sigstore.issuer, theirs))


@pytest.mark.parametrize(
    ("log", "why"), [("tlogs", "invalid log entry: .*[Ss]ignature"), ("ctlogs", "SCT verify failed")]
)
def test_another_log_is_not_believed(registry, version, sigstore, alice, trust, tmp_path, log, why) -> None:
    sign_version(registry, "tiny", alice)
    with SigstoreServer() as other:
        theirs = json.loads(other.write_trust_config(tmp_path / "theirs.json").read_text())
    mixed = json.loads(trust.read_text())
    mixed["trustedRoot"][log] = theirs["trustedRoot"][log]
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    with pytest.raises(SignatureError, match=why):
        verify_signature(registry, "tiny", IdentityVerifier(ALICE, sigstore.issuer, tmp_path / "mixed.json"))


@pytest.mark.parametrize(("identity", "issuer"), [("", "https://x"), (ALICE, ""), ("", "")])
def test_half_an_identity_is_none(identity, issuer) -> None:
    """An empty issuer would let anybody's word count."""
    with pytest.raises(SignatureError, match="is empty"):
        IdentityVerifier(identity, issuer)


def test_verifying_asks_nobody(registry, version, sigstore, alice, is_alice) -> None:
    sign_version(registry, "tiny", alice)
    asked = len(sigstore.requests)
    verify_signature(registry, "tiny", is_alice)
    assert len(sigstore.requests) == asked


def test_the_tool_of_the_openssf_reads_it(registry, checkpoint, version, sigstore, trust, alice, tmp_path) -> None:
    signature = sign_version(registry, "tiny", alice)
    registry.materialize(checkpoint, tmp_path / "model")
    command = [sys.executable, "-m", "model_signing", "verify", "sigstore", str(tmp_path / "model")]
    command += ["--signature", str(registry.path(signature, SIGNATURE)), "--trust_config", str(trust)]
    command += ["--identity", ALICE, "--identity_provider", sigstore.issuer]
    assert subprocess.run(command, check=False).returncode == 0
    (tmp_path / "model" / "config.json").write_bytes(b"{}")
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0


def test_a_job_of_a_ci_signs_as_its_workflow(registry, version, sigstore, trust, monkeypatch) -> None:
    """GitHub's way: the job asks for the token with a secret of its own."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", JOB_SECRET)
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{sigstore.endpoint}/github")
    sign_version(registry, "tiny", KeylessSigner(trust_config=trust))
    assert verify_signature(registry, "tiny", IdentityVerifier(WORKFLOW, GITHUB, trust))
    monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN")
    with pytest.raises(SignatureError, match="permissions"):
        sign_version(registry, "tiny", KeylessSigner(trust_config=trust))


def test_somebody_signs_in_with_a_browser(registry, version, sigstore, trust, is_alice, tmp_path) -> None:
    """Where none can be opened, the address is printed, and the code that its page shows is typed in."""
    command = [*SIGN, "--trust-config", str(trust)]
    environment = os.environ | {"BITSMITH_HOME": str(tmp_path), "BROWSER": "/bin/false"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        address = next(line.strip() for line in process.stderr if "/issuer/auth" in line)
        with urllib.request.urlopen(address) as page:
            code = json.loads(page.read())["code"]
        said, complained = process.communicate(f"{code}\n", timeout=60)
    assert process.returncode == 0, complained
    assert "tiny:1 is signed" in said
    assert verify_signature(registry, "tiny", is_alice)


def test_nobody_to_sign_in_is_said(registry, version, sigstore, trust, tmp_path) -> None:
    command = [*SIGN, "--trust-config", str(trust)]
    environment = os.environ | {"BITSMITH_HOME": str(tmp_path), "BROWSER": "/bin/false"}
    nobody = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    ended = subprocess.run(command, env=environment, check=False, **nobody)
    assert ended.returncode == 1
    assert "--identity-token-variable" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert signatures(registry, version.digest) == []


# What does not hold


def test_damage_is_never_signed_nor_verified(registry, checkpoint, version, sigstore, alice, is_alice) -> None:
    sign_version(registry, "tiny", alice)
    blob = registry.path(checkpoint, "config.json")
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes().replace(b"64", b"65"))
    with pytest.raises(SignatureError, match=r"none holds: .*config\.json"):
        verify_signature(registry, "tiny", is_alice)
    with pytest.raises(IntegrityError):
        sign_version(registry, "tiny", alice)
    assert sigstore.num_entries() == 1


def test_another_version_does_not_take_the_signature(registry, version, alice, is_alice, make_folder) -> None:
    content = registry.path(sign_version(registry, "tiny", alice), SIGNATURE).read_bytes()
    other = registry.add_artifact("checkpoint", make_folder({"config.json": b"evil"}))
    registry.publish("other", other)
    registry.add_artifact("signature", make_folder({SIGNATURE: content}), [other.digest])
    with pytest.raises(SignatureError, match="none holds"):
        verify_signature(registry, "other", is_alice)


def test_a_signature_holds_for_no_file_that_it_leaves_out(registry, version, alice, is_alice, make_folder) -> None:
    bundle = registry.path(sign_version(registry, "tiny", alice), SIGNATURE).read_bytes()
    more = registry.add_artifact("x", make_folder({".git/config": b"evil"}))
    forged = Artifact.create("checkpoint", {**registry.get(version.digest).files, **more.files})
    registry.record(forged)
    signature = registry.add_artifact("signature", make_folder({SIGNATURE: bundle}), [forged.digest])
    with pytest.raises(SignatureError, match="leaves out"):
        verify_artifact(registry, forged, is_alice, "forged", [signature])


def test_a_signature_does_not_bring_its_own_weights(registry, version, alice, is_alice, make_folder) -> None:
    bundle = registry.path(sign_version(registry, "tiny", alice), SIGNATURE).read_bytes()
    genuine = registry.get(version.digest)
    forged = registry.add_artifact("checkpoint", make_folder({"config.json": b"evil", "model.safetensors": b"evil"}))
    crafted = Artifact.create("signature", {SIGNATURE: FileEntry.of_bytes(bundle), **genuine.files}, [forged.digest])
    with pytest.raises(SignatureError, match="no signature of this version"):
        verify_artifact(registry, forged, is_alice, "forged", [crafted])


def forge_payload(bundle: dict) -> None:
    """Another statement under the same signature."""
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"]).replace(b"files", b"FILES")
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()


def forge_time(bundle: dict) -> None:
    entry = bundle["verificationMaterial"]["tlogEntries"][0]
    entry["integratedTime"] = str(int(entry["integratedTime"]) + 1)


def forge_proof(bundle: dict) -> None:
    proof = bundle["verificationMaterial"]["tlogEntries"][0]["inclusionProof"]
    proof["hashes"] = proof["hashes"][::-1]


def forget_log(bundle: dict) -> None:
    bundle["verificationMaterial"]["tlogEntries"] = []


def forget_promise(bundle: dict) -> None:
    del bundle["verificationMaterial"]["tlogEntries"][0]["inclusionPromise"]


def forget_certificate(bundle: dict) -> None:
    bundle["verificationMaterial"]["publicKey"] = {"hint": "x"}
    del bundle["verificationMaterial"]["certificate"]


@pytest.mark.parametrize(
    "forge", [forge_payload, forge_time, forge_proof, forget_log, forget_promise, forget_certificate]
)
def test_a_forged_bundle_does_not_hold(registry, version, alice, is_alice, make_folder, tmp_path, forge) -> None:
    bundle = bundle_of(registry, sign_version(registry, "tiny", alice))
    forge(bundle)
    content = json.dumps(bundle).encode()
    forged = registry.add_artifact("signature", make_folder({SIGNATURE: content}), [version.digest])
    with pytest.raises(SignatureError, match="none holds"):
        verify_artifact(registry, registry.get(version.digest), is_alice, "tiny", [forged])


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"null", b"\xff" * 100, b'{"dsseEnvelope": 1}'])
def test_what_is_no_signature_is_refused(registry, version, is_alice, make_folder, content) -> None:
    registry.add_artifact("signature", make_folder({SIGNATURE: content, "x": b""}), [version.digest])
    with pytest.raises(SignatureError, match="none holds"):
        verify_signature(registry, "tiny", is_alice)


def test_a_key_and_an_identity_do_not_stand_in_for_each_other(registry, version, alice, is_alice, tmp_path) -> None:
    private, public = write_keys(tmp_path, "key", ec.SECP256R1())
    keyless = sign_version(registry, "tiny", alice)
    with pytest.raises(SignatureError, match="is of an identity, not of a key"):
        verify_signature(registry, "tiny", KeyVerifier(public))
    of_key = sign_version(registry, "tiny", KeySigner(private))
    assert verify_signature(registry, "tiny", KeyVerifier(public)) == of_key
    assert verify_signature(registry, "tiny", is_alice) == keyless
    with pytest.raises(SignatureError, match="is of a key, not of an identity"):
        verify_artifact(registry, registry.get(version.digest), is_alice, "tiny", [of_key])


def test_a_signature_goes_along_with_an_export(registry, version, alice, is_alice, tmp_path) -> None:
    sign_version(registry, "tiny", alice)
    other = Registry(tmp_path / "other")
    import_version(other, export_version(registry, "tiny", tmp_path / "tiny.tar").path)
    assert verify_signature(other, "tiny", is_alice)


# What goes wrong


def refused(registry: Registry, version: Version, signer: KeylessSigner) -> str:
    """The error, in one paragraph without the token; nothing is left of the attempt."""
    with pytest.raises(SignatureError) as caught:
        sign_version(registry, "tiny", signer)
    assert signatures(registry, version.digest) == []
    assert not list(registry.root.glob("signing-*"))
    assert "\n" not in str(caught.value)
    if signer.token:
        assert signer.token not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


@pytest.mark.parametrize(
    ("claims", "why"),
    [
        ({"exp": 1_700_000_000}, "expired"),
        ({"aud": "elsewhere"}, "another audience"),
        ({"sub": None}, "lacks one of the claims"),
    ],
)
def test_a_token_that_cannot_be_used(registry, version, sigstore, trust, claims, why) -> None:
    assert why in refused(registry, version, KeylessSigner(sigstore.token(**claims), trust))
    assert not sigstore.requests, "nobody was asked"


@pytest.mark.parametrize("token", ["", "secret", "secret.secret.secret", "a.b\n.c", "a.b.c\r\nX-Header: x"])
def test_what_is_no_token(registry, version, sigstore, trust, token) -> None:
    with pytest.raises(SignatureError, match="identity token") as caught:
        sign_version(registry, "tiny", KeylessSigner(token, trust))
    assert "secret" not in str(caught.value)
    assert not sigstore.requests


def test_a_token_of_an_issuer_that_fulcio_does_not_know(registry, version, sigstore, trust) -> None:
    said = refused(registry, version, KeylessSigner(sigstore.token(iss="https://mallory.example"), trust))
    assert "refuses the identity token (HTTP 401)" in said


@pytest.mark.parametrize("part", ["signingCert", "log/entries", "openid-configuration"])
@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_cannot(registry, version, sigstore, alice, is_alice, part, status) -> None:
    """It sends the token back, which the error must not show."""
    sigstore.faults[part] = status
    said = refused(registry, version, alice)
    assert f"{sigstore.endpoint} answers with HTTP {status}. Wait a little" in said
    sigstore.faults.clear()
    sign_version(registry, "tiny", KeylessSigner(alice.token, alice.trust_config))
    assert verify_signature(registry, "tiny", is_alice)


@pytest.mark.parametrize("part", ["signingCert", "log/entries"])
def test_a_server_that_never_answers(registry, version, sigstore, alice, part, monkeypatch) -> None:
    monkeypatch.setattr("registry.keyless.WAIT_SECONDS", 0.3)
    sigstore.silent = part
    assert f"{sigstore.endpoint} cannot be reached" in refused(registry, version, alice)


def test_a_log_that_lies(registry, version, sigstore, alice) -> None:
    """Its answer would be kept, published, and refused by everybody."""
    sigstore.is_lying = True
    assert "inclusion proof" in refused(registry, version, alice)


def test_a_server_that_is_gone(registry, version, tmp_path) -> None:
    with SigstoreServer() as server:
        gone = KeylessSigner(server.token(), server.write_trust_config(tmp_path / "gone.json"))
    assert f"{server.endpoint} cannot be reached" in refused(registry, version, gone)


def test_the_public_instance_without_a_network(registry, version, sigstore, tmp_path, monkeypatch) -> None:
    """The real trust root, from where it really lies, through a proxy that is none."""
    for variable in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "user"))
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    assert "trust root of the public Sigstore cannot be fetched" in refused(
        registry, version, KeylessSigner(sigstore.token())
    )
    with pytest.raises(SignatureError, match="verified: the trust root of the public Sigstore cannot be fetched"):
        verify_signature(registry, "tiny", IdentityVerifier(ALICE, sigstore.issuer))


def damages(whole: str) -> dict[str, bytes]:
    config = json.loads(whole)
    unsigned = {**config, "trustedRoot": {**config["trustedRoot"], "tlogs": []}}
    garbled = json.loads(whole)
    garbled["trustedRoot"]["certificateAuthorities"][0]["certChain"]["certificates"][0]["rawBytes"] = "AAAA"
    return {
        "empty": b"",
        "cut": whole[: len(whole) // 2].encode(),
        "no text": b"\xff\xfe",
        "a list": b"[]",
        "no root": json.dumps({k: v for k, v in config.items() if k != "trustedRoot"}).encode(),
        "no log": json.dumps(unsigned).encode(),
        "no certificate": json.dumps(garbled).encode(),
        "deep": b"[" * 100_000,
    }


@pytest.mark.parametrize("damage", ["empty", "cut", "no text", "a list", "no root", "no log", "no certificate", "deep"])
def test_a_damaged_trust_configuration(registry, version, sigstore, trust, damage) -> None:
    trust.write_bytes(damages(trust.read_text())[damage])
    assert "trust.json is not the trust configuration" in refused(
        registry, version, KeylessSigner(sigstore.token(), trust)
    )
    with pytest.raises(SignatureError, match=r"trust\.json is not the trust configuration"):
        verify_signature(registry, "tiny", IdentityVerifier(ALICE, sigstore.issuer, trust))
    assert not sigstore.requests


def test_a_trust_configuration_that_is_not_there(registry, version, sigstore, tmp_path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(RegistryError, match=re.escape(str(path))):
            sign_version(registry, "tiny", KeylessSigner(sigstore.token(), path))


def test_without_the_extra_it_is_named(registry, version, alice, is_alice, monkeypatch) -> None:
    sign_version(registry, "tiny", alice)
    for module in ("model_signing", "sigstore", "sigstore.oidc", "sigstore.models", "requests"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RegistryError, match=r"bitsmith\[signing\]"):
        sign_version(registry, "tiny", KeylessSigner(alice.token, alice.trust_config))
    fresh = IdentityVerifier(is_alice.identity, is_alice.issuer, is_alice.trust_config)
    with pytest.raises(RegistryError, match=r"bitsmith\[signing\]"):
        verify_signature(registry, "tiny", fresh)


def test_a_token_stands_nowhere(registry, version, alice, is_alice, caplog, capfd) -> None:
    caplog.set_level(logging.DEBUG)
    sign_version(registry, "tiny", alice)
    verify_signature(registry, "tiny", is_alice)
    held = b"".join(path.read_bytes() for path in registry.root.rglob("*") if path.is_file())
    printed = capfd.readouterr()
    for place in (held.decode(errors="replace"), caplog.text, printed.out, printed.err, repr(alice), str(is_alice)):
        for part in alice.token.split("."):
            assert part not in place
