"""What comes from the Hub is trusted for nothing: signatures, manifests that lie, pickles, names that lead out."""

import json
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from registry import (
    Artifact,
    IntegrityError,
    InvalidDescriptionError,
    KeySigner,
    KeyVerifier,
    Registry,
    SignatureError,
    UnsafeFileError,
    Version,
    pull,
    sign_version,
    verify_signature,
)
from registry.artifact import FileEntry, canonical_json
from registry.publication import MANIFEST, MOST_MANIFEST_BYTES, SIGNATURE, Manifest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from hub_server import HubServer, StoredFile
from hub_steps import CARD, REPO, fetch, fetch_whole, send
from keys import write_keys


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "ours", ec.SECP256R1())


@pytest.fixture
def evaluated(registry: Registry, checkpoint: Artifact, make_folder) -> Version:
    """A version with a report, and a lineage of which the registry knows one."""
    statistics = registry.add_artifact("statistics", make_folder({"s": b"1"}), [], {"samples": 3})
    plan = registry.add_artifact("plan", make_folder({"p": b"1"}), [statistics.digest])
    made = registry.add_artifact("checkpoint", make_folder({"config.json": b"{}"}), [plan.digest, "cd" * 32])
    report = registry.add_artifact("report", make_folder({"report.json": b"{}", "heat.png": b"png"}), [made.digest])
    return registry.publish("tiny", made, report)


def change(hub: HubServer, path: str, content: bytes) -> None:
    """Somebody with the right to write commits other bytes to main."""
    hub.repos[REPO].commit(hub.head(REPO) | {path: StoredFile(content, len(content) >= 1000)}, "changed")


def refuses(other: Registry) -> bool:
    """Nothing that anybody could load is here."""
    return not other.versions()


# Report and lineage


def test_the_report_and_the_lineage_come_along(registry: Registry, evaluated: Version, hub: HubServer, other: Registry):
    send(registry, hub)
    assert {"report/report.json", "report/heat.png"} <= set(hub.head(REPO))
    pulled = fetch(other, hub)
    assert (pulled.digest, pulled.report_digest) == (evaluated.digest, evaluated.report_digest)
    report = other.get(pulled.report_digest)
    assert other.path(report, "heat.png").read_bytes() == b"png"
    known = other.lineage(pulled.digest)
    assert [artifact.kind for artifact in known.artifacts] == ["checkpoint", "plan", "statistics"]
    assert known.missing == ("cd" * 32,)
    assert known.artifacts[2].metadata == {"samples": 3}


def test_the_next_version_without_a_report_takes_the_old_one_away(registry, evaluated, hub, make_folder):
    send(registry, hub)
    registry.publish("tiny", registry.add_artifact("checkpoint", make_folder({"config.json": b"[]"})))
    send(registry, hub)
    assert set(hub.head(REPO)) == {".gitattributes", "README.md", MANIFEST, "config.json"}


# Signatures


def test_a_signed_push_is_verified_before_anything_is_published(registry, evaluated, hub, other, keys, tmp_path):
    private, public = keys
    sent = send(registry, hub, signer=KeySigner(private))
    assert (sent.is_signed, sent.is_all_signed) == (True, True)
    result = fetch_whole(other, hub, verifier=KeyVerifier(public))
    assert (result.is_signed, result.is_verified, result.is_report_left_out) == (True, True, False)
    assert verify_signature(other, "tiny-3bpw", KeyVerifier(public)).kind == "signature"
    _, theirs = write_keys(tmp_path, "theirs", ec.SECP256R1())
    third = Registry(tmp_path / "third")
    with pytest.raises(SignatureError, match=r"theirs\.pub"):
        fetch(third, hub, verifier=KeyVerifier(theirs))
    assert refuses(third)
    assert not fetch_whole(third, hub).is_verified


def test_openssf_verifies_a_downloaded_folder(registry, evaluated, hub, keys, tmp_path):
    """What anyone does who has the repository and not bitsmith."""
    from model_signing import hashing, verifying

    private, public = keys
    send(registry, hub, signer=KeySigner(private))
    folder = tmp_path / "snapshot"
    for path, file in hub.head(REPO).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(file.content)

    def verify() -> None:
        ignored = hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE], ignore_git_paths=True)
        config = verifying.Config().use_elliptic_key_verifier(public_key=public).set_hashing_config(ignored)
        config.verify(folder, folder / SIGNATURE)

    verify()
    (folder / "README.md").write_text(CARD + "changed")
    with pytest.raises(ValueError, match=r"README\.md"):
        verify()


def test_signing_the_same_twice_gives_one_commit(registry, evaluated, hub, keys):
    private, _ = keys
    hub.faults["/tag/"] = 500
    with pytest.raises(ConnectionError):
        send(registry, hub, signer=KeySigner(private))
    hub.faults.clear()
    result = send(registry, hub, signer=KeySigner(private))
    assert result.num_uploaded == 0
    assert len(list(hub.repos[REPO].history(result.commit))) == 2


def test_another_key_signs_anew(registry, evaluated, hub, keys, tmp_path):
    send(registry, hub, signer=KeySigner(keys[0]), tag="first")
    other_private, other_public = write_keys(tmp_path, "next", ec.SECP384R1(), b"secret")
    send(registry, hub, signer=KeySigner(other_private, "secret"), tag="second")
    mine = Registry(tmp_path / "mine")
    assert fetch_whole(mine, hub, revision="second", verifier=KeyVerifier(other_public)).is_verified
    with pytest.raises(SignatureError, match=r"not a private key|cannot be read"):
        send(registry, hub, signer=KeySigner(other_private, "wrong"), tag="third")


def test_a_signature_of_the_registry_is_published_too(registry, evaluated, hub, other, keys):
    """It was made where the key is, and covers the version's own files."""
    private, public = keys
    sign_version(registry, "tiny", KeySigner(private))
    for _ in range(2):  # the second finds the tag
        sent = send(registry, hub)
        assert (sent.is_signed, sent.is_all_signed) == (True, False)
    result = fetch_whole(other, hub, verifier=KeyVerifier(public))
    assert (result.is_verified, result.is_report_left_out) == (True, True)
    again = pull(REPO, other, offline=True, verifier=KeyVerifier(public))
    assert (again.is_verified, again.is_report_left_out) == (True, True)


def test_a_version_that_was_changed_with_its_manifest_has_no_signature(
    registry, evaluated, hub, other, keys, make_folder
):
    private, public = keys
    send(registry, hub, signer=KeySigner(private))
    forged = Artifact.create("checkpoint", {"config.json": FileEntry.of_bytes(b"evil")})
    card = FileEntry.of_bytes(CARD.encode())
    change(hub, "config.json", b"evil")
    change(hub, MANIFEST, Manifest(forged, None, (), card).to_json().encode())
    with pytest.raises(SignatureError):
        fetch(other, hub, verifier=KeyVerifier(public))
    assert refuses(other)


def test_an_unsigned_version_is_refused_where_a_key_is_given(registry, version, hub, other, keys):
    send(registry, hub)
    with pytest.raises(SignatureError, match="it has none"):
        fetch(other, hub, verifier=KeyVerifier(keys[1]))
    assert refuses(other)


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b'{"dsseEnvelope": {"payload": "bm8="}}', b"\xff"])
def test_a_signature_that_is_none(registry, version, hub, other, keys, content):
    send(registry, hub)
    change(hub, SIGNATURE, content)
    with pytest.raises(SignatureError):
        fetch(other, hub, verifier=KeyVerifier(keys[1]))
    assert refuses(other)


def test_a_changed_card_is_found(registry, version, hub, other):
    send(registry, hub)
    change(hub, "README.md", CARD.encode() + b"<script>alert(1)</script>")
    with pytest.raises(IntegrityError, match=r"README\.md"):
        fetch(other, hub)
    assert refuses(other)


# Manifests and files


@pytest.mark.parametrize(
    "path",
    [
        *("pytorch_model.bin", "model.pkl", "a/b.PT", "x.ckpt", "modeling_evil.py", "run.sh", "lib.so", "n.npy"),
        *("weights", "model.onnx", "model.nemo", "LICENSE.pkl", "lib.so.6", "evil.py."),
    ],
)
def test_what_could_be_executed_is_neither_sent_nor_fetched(registry, hub, other, make_folder, path):
    files = {"config.json": b"{}", path: b"cos\nsystem\n(S'true'\ntR."}
    registry.publish("tiny", registry.add_artifact("checkpoint", make_folder(files)))
    with pytest.raises(UnsafeFileError, match=Path(path).name):
        send(registry, hub)
    assert hub.repos == {}
    evil = registry.get(registry.version("tiny").digest)
    described = {"format": 1, "artifact": json.loads(evil.to_json()), "report": None, "lineage": [], "card": None}
    publish_by_hand(hub, canonical_json(described).encode(), files)
    with pytest.raises(UnsafeFileError, match=Path(path).name):
        fetch(other, hub)
    assert not hub.sent(f"{path}")
    assert refuses(other)


def test_what_model_folders_hold_is_sent_and_fetched(registry, hub, other, make_folder):
    names = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model.v3", "qwen.tiktoken", "vocab.bpe"]
    names += ["merges.txt", "additional_chat_templates/tool.jinja", "LICENSE", "LICENSE-2.0", "NOTICE", "USE_POLICY.md"]
    files = {name: name.encode() for name in names}
    registry.publish("tiny", registry.add_artifact("checkpoint", make_folder(files)))
    send(registry, hub)
    assert set(other.get(fetch(other, hub).digest).files) == set(names)


def publish_by_hand(hub: HubServer, manifest: bytes, files: dict[str, bytes]) -> None:
    from hub_server import Repo

    stored = {path: StoredFile(content, False) for path, content in files.items()}
    hub.repos[REPO] = Repo(private=False)
    hub.repos[REPO].commit(stored | {MANIFEST: StoredFile(manifest, False)}, "by hand")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"7",
        b"null",
        b'{"format": 2}',
        b'{"format": 1}',
        b'{"format": 1, "artifact": 3, "report": null, "lineage": [], "card": null}',
        b'{"format": 1, "artifact": {}, "report": null, "lineage": {"a": 1}, "card": null}',
        b"[" * 200_000,
        b'{"a":' * 200_000,
    ],
)
def test_a_manifest_that_is_none(hub, other, text):
    publish_by_hand(hub, text, {})
    with pytest.raises(InvalidDescriptionError, match=r"bitsmith-manifest|not the description"):
        fetch(other, hub)
    assert refuses(other)


def test_a_manifest_of_gigabytes_is_not_read(hub, other):
    publish_by_hand(hub, b"{}", {})
    hub.head(REPO)[MANIFEST].size = MOST_MANIFEST_BYTES + 1
    with pytest.raises(IntegrityError, match="at most"):
        fetch(other, hub)
    assert not hub.sent("/resolve/")


def test_a_lineage_that_belongs_to_another_version_is_refused(registry, version, hub, other, make_folder):
    stray = registry.add_artifact("statistics", make_folder({"x": b"1"}))
    manifest = Manifest(registry.get(version.digest), None, (stray,), None)
    publish_by_hand(hub, manifest.to_json().encode(), {})
    with pytest.raises(IntegrityError, match=stray.digest[:12]):
        fetch(other, hub)
    assert refuses(other)


@pytest.mark.parametrize(
    "path", ["../evil", "/evil", "a/../../evil", "C:/evil", "a\\..\\evil", "nul\x00byte", "x" * 4096, "report/../../e"]
)
def test_names_that_lead_out_are_refused(hub, other, path):
    entry = {"sha256": FileEntry.of_bytes(b"evil").sha256, "size_bytes": 4}
    artifact = {"format": 1, "kind": "checkpoint", "files": {path: entry}, "parents": [], "metadata": {}}
    artifact["digest"] = "0" * 64
    described = {"format": 1, "artifact": artifact, "report": None, "lineage": [], "card": None}
    publish_by_hand(hub, json.dumps(described).encode(), {"evil": b"evil"})
    before = sorted(other.root.parent.rglob("*"))
    with pytest.raises(ValueError, match="refused"):
        fetch(other, hub)
    assert [p for p in sorted(other.root.parent.rglob("*")) if "evil" in p.name and p not in before] == []
    assert refuses(other)


def test_a_config_that_asks_for_remote_code_brings_no_code_along(registry, hub, other, make_folder):
    """The code lies beside it, is in no manifest, and is not fetched; what loads a folder never asks for it."""
    config = json.dumps({"auto_map": {"AutoModelForCausalLM": "evil.EvilModel"}}).encode()
    registry.publish("tiny", registry.add_artifact("checkpoint", make_folder({"config.json": config})))
    send(registry, hub)
    change(hub, "evil.py", b"raise SystemExit")
    pulled = fetch(other, hub)
    assert set(other.get(pulled.digest).files) == {"config.json"}
    assert not hub.sent("evil.py")
