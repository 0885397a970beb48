"""Publications with keyless signatures: what a push makes and a pull refuses, as for keys."""

import json
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from registry import (
    Artifact,
    HubConflictError,
    IdentityVerifier,
    KeylessSigner,
    KeySigner,
    KeyVerifier,
    Registry,
    SignatureError,
    Version,
    pull,
    sign_version,
    signatures,
    verify_signature,
)
from registry.artifact import FileEntry, canonical_json
from registry.patience import ONCE
from registry.publication import MANIFEST, SIGNATURE, Manifest
from registry.signing import signed_paths

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from hub_server import READ_TOKEN, HubServer, Repo, StoredFile
from hub_steps import CARD, REPO, fetch, fetch_whole, send
from keys import write_keys
from sigstore_server import GITHUB, JOB_SECRET

BOB = "bob@example.com"
THEIRS = "mallory/tiny"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def evaluated(registry: Registry, make_folder) -> Version:
    """A version with a report."""
    made = registry.add_artifact("checkpoint", make_folder({"config.json": b"{}", "plan.json": b"[]"}))
    report = registry.add_artifact("report", make_folder({"report.json": b'{"kld": 1}'}), [made.digest])
    return registry.publish("tiny", made, report)


def change(hub: HubServer, path: str, content: bytes, repo_id: str = REPO) -> None:
    """Somebody with the right to write commits other bytes to main."""
    hub.repos[repo_id].commit(hub.head(repo_id) | {path: StoredFile(content, False)}, "changed")


def bundle_at(hub: HubServer) -> bytes:
    return hub.head(REPO)[SIGNATURE].content


def test_a_signed_push_is_verified_before_anything_is_published(
    registry, evaluated, hub, other, sigstore, trust, alice, is_alice, tmp_path
) -> None:
    assert send(registry, hub, signer=alice).is_signed
    assert signed_paths(bundle_at(hub)) == {"config.json", "plan.json", "report/report.json", "README.md", MANIFEST}
    result = fetch_whole(other, hub, verifier=is_alice)
    assert (result.is_signed, result.is_verified) == (True, True)
    assert result.version.report_digest == evaluated.report_digest
    assert verify_signature(other, "tiny-3bpw", is_alice).kind == "signature"
    third = Registry(tmp_path / "third")
    for stranger in (
        IdentityVerifier(BOB, sigstore.issuer, trust),
        IdentityVerifier(is_alice.identity, sigstore.other_issuer, trust),
    ):
        with pytest.raises(SignatureError, match="none holds"):
            fetch(third, hub, verifier=stranger)
    assert not third.versions()
    assert signatures(third, evaluated.digest) == []
    assert not fetch_whole(third, hub).is_verified


def test_a_push_again_gives_the_same_commit_and_no_second_entry(
    registry, evaluated, hub, sigstore, trust, alice
) -> None:
    """Each time with a token of its own, as the next job or the next day has one."""
    hub.faults["/tag/"] = 500
    with pytest.raises(ConnectionError):
        send(registry, hub, signer=alice)
    hub.faults.clear()
    results = [send(registry, hub, signer=KeylessSigner(sigstore.token(nonce=number), trust)) for number in range(2)]
    assert [result.num_uploaded for result in results] == [0, 0]
    assert len({result.commit for result in results}) == 1
    assert len(list(hub.repos[REPO].history(results[0].commit))) == 2
    assert sigstore.num_entries() == 1


def test_a_workflow_finds_its_signature_again(registry, evaluated, hub, sigstore, trust, monkeypatch) -> None:
    """Its certificate names the workflow, which is not the subject of its token."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", JOB_SECRET)
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{sigstore.endpoint}/github")
    first, second = (send(registry, hub, signer=KeylessSigner(trust_config=trust)) for _ in range(2))
    assert first.commit == second.commit
    assert sigstore.num_entries() == 1
    certificate = signatures(registry, evaluated.digest)
    assert len(certificate) == 1
    workflow = "https://github.com/alice/models/.github/workflows/publish.yml@refs/heads/main"
    assert verify_signature(registry, "tiny", IdentityVerifier(workflow, GITHUB, trust)) == certificate[0]


def test_another_identity_signs_anew(registry, evaluated, hub, other, sigstore, trust, alice, is_alice) -> None:
    send(registry, hub, signer=alice, tag="first")
    for number, token in enumerate([sigstore.token(BOB), sigstore.token(iss=sigstore.other_issuer)]):
        send(registry, hub, signer=KeylessSigner(token, trust), tag=f"next{number}")
    assert sigstore.num_entries() == 3
    for tag, identity, issuer in (
        ("first", is_alice.identity, sigstore.issuer),
        ("next0", BOB, sigstore.issuer),
        ("next1", is_alice.identity, sigstore.other_issuer),
    ):
        mine = IdentityVerifier(identity, issuer, trust)
        assert fetch_whole(other, hub, name=tag, revision=tag, verifier=mine).is_verified
    with pytest.raises(SignatureError, match="none holds"):
        fetch(other, hub, name="x", revision="next0", verifier=is_alice)


def test_a_tag_that_somebody_else_signed_stays(registry, evaluated, hub, sigstore, trust, alice) -> None:
    send(registry, hub, signer=alice)
    before = bundle_at(hub)
    with pytest.raises(HubConflictError, match="v1 already"):
        send(registry, hub, signer=KeylessSigner(sigstore.token(BOB), trust))
    assert bundle_at(hub) == before


def test_a_failure_to_sign_sends_nothing(registry, evaluated, hub, sigstore, trust, alice) -> None:
    sigstore.faults["log/entries"] = 503
    with pytest.raises(SignatureError, match="HTTP 503"):
        send(registry, hub, signer=alice)
    with pytest.raises(SignatureError, match="expired"):
        send(registry, hub, signer=KeylessSigner(sigstore.token(lifetime_s=-60), trust))
    assert hub.requests == []
    assert signatures(registry, evaluated.digest) == []


def test_a_signature_of_the_registry_is_published_too(registry, evaluated, hub, other, alice, is_alice) -> None:
    """It covers the version's own files; a report that it does not speak of is left out of a pull."""
    sign_version(registry, "tiny", alice)
    assert send(registry, hub).is_signed
    result = fetch_whole(other, hub, verifier=is_alice)
    assert result.is_verified
    assert result.version.report_digest is None


def test_a_key_and_an_identity_do_not_stand_in_for_each_other(
    registry, evaluated, hub, other, alice, is_alice, tmp_path
) -> None:
    private, public = write_keys(tmp_path, "key", ec.SECP256R1())
    send(registry, hub, signer=KeySigner(private), tag="of-key")
    send(registry, hub, signer=alice, tag="of-alice")
    with pytest.raises(SignatureError, match="is of a key, not of an identity"):
        fetch(other, hub, revision="of-key", verifier=is_alice)
    with pytest.raises(SignatureError, match="is of an identity, not of a key"):
        fetch(other, hub, revision="of-alice", verifier=KeyVerifier(public))
    assert not other.versions()
    assert fetch_whole(other, hub, revision="of-key", verifier=KeyVerifier(public)).is_verified
    assert fetch_whole(other, hub, revision="of-alice", verifier=is_alice).is_verified


def test_a_version_that_was_changed_with_its_manifest_has_no_signature(
    registry, evaluated, hub, other, alice, is_alice
) -> None:
    send(registry, hub, signer=alice)
    forged = Artifact.create("checkpoint", {"config.json": FileEntry.of_bytes(b"evil")})
    change(hub, "config.json", b"evil")
    change(hub, MANIFEST, Manifest(forged, None, (), FileEntry.of_bytes(CARD.encode())).to_json().encode())
    with pytest.raises(SignatureError):
        fetch(other, hub, verifier=is_alice)
    assert not other.versions()


def test_an_unsigned_version_is_refused(registry, evaluated, hub, other, is_alice) -> None:
    send(registry, hub)
    with pytest.raises(SignatureError, match="it has none"):
        fetch(other, hub, verifier=is_alice)
    assert not other.versions()


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b'{"dsseEnvelope": {"payload": "bm8="}}', b"\xff"])
def test_a_signature_that_is_none(registry, evaluated, hub, other, is_alice, content) -> None:
    send(registry, hub)
    change(hub, SIGNATURE, content)
    with pytest.raises(SignatureError):
        fetch(other, hub, verifier=is_alice)
    assert not other.versions()


def test_a_signature_from_here_does_not_vouch_for_a_strangers_report(
    registry, evaluated, hub, other, alice, is_alice
) -> None:
    send(registry, hub, signer=alice)
    made = registry.get(evaluated.digest)
    forged = b'{"kld": 0}'
    lie = Artifact.create("report", {"report.json": FileEntry.of_bytes(forged)}, [made.digest])
    plain = {"format": 1, "artifact": json.loads(made.to_json()), "report": json.loads(lie.to_json())}
    manifest = canonical_json(plain | {"lineage": [], "card": None}).encode()
    files = {"config.json": b"{}", "plan.json": b"[]", "report/report.json": forged, MANIFEST: manifest}
    hub.repos[THEIRS] = Repo(private=False)
    hub.repos[THEIRS].commit({path: StoredFile(content, False) for path, content in files.items()}, "by hand")

    def theirs(**changes) -> Version:
        return pull(THEIRS, other, endpoint=hub.endpoint, token=READ_TOKEN, patience=ONCE, **changes).version

    assert theirs(name="tiny").report_digest == lie.digest
    with pytest.raises(SignatureError, match="report that the signature does not speak of"):
        fetch(other, hub, name="tiny", verifier=is_alice)
    assert fetch(other, hub, name="sound", verifier=is_alice).report_digest == evaluated.report_digest
    with pytest.raises(SignatureError, match="it has none"):
        theirs(name="theirs", verifier=is_alice)


def test_a_trust_configuration_is_read_before_anything_is_sent_for(
    registry, evaluated, hub, other, alice, trust
) -> None:
    send(registry, hub, signer=alice)
    asked = len(hub.requests)
    trust.write_text("{")
    with pytest.raises(SignatureError, match="is not the trust configuration"):
        fetch(other, hub, verifier=IdentityVerifier("alice@example.com", "https://x", trust))
    assert len(hub.requests) == asked


def test_a_lock_file_and_no_network_go_with_an_identity(
    registry, evaluated, hub, other, sigstore, trust, alice, is_alice, tmp_path
) -> None:
    lock = tmp_path / "bitsmith.lock"
    send(registry, hub, signer=alice)
    pulled = fetch(other, hub, lock_file=lock, verifier=is_alice)
    asked = len(hub.requests), len(sigstore.requests)
    again = fetch_whole(other, hub, lock_file=lock, offline=True, verifier=is_alice)
    assert (again.version, again.is_verified) == (pulled, True)
    with pytest.raises(SignatureError, match="none holds"):
        fetch(other, hub, lock_file=lock, offline=True, verifier=IdentityVerifier(BOB, sigstore.issuer, trust))
    assert (len(hub.requests), len(sigstore.requests)) == asked
