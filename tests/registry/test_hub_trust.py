"""What comes from the Hub is trusted for nothing: signatures, manifests that lie, pickles, names that lead out."""

import json
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from registry import (
    Artifact,
    HubAuthError,
    HubConflictError,
    IntegrityError,
    InvalidDescriptionError,
    InvalidNameError,
    NotFoundError,
    NotPublishedError,
    Overview,
    PinError,
    Registry,
    SignatureError,
    SignKey,
    UnsafeFileError,
    Version,
    add_to_collection,
    sign_version,
    verify_signature,
)
from registry.artifact import FileEntry, canonical_json
from registry.patience import ONCE
from registry.publication import MANIFEST, MOST_MANIFEST_BYTES, SIGNATURE, Manifest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from hub_server import WRITE_TOKEN, HubServer, StoredFile
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
    assert send(registry, hub, sign_key=SignKey(private)).is_signed
    result = fetch_whole(other, hub, public_key=public)
    assert (result.is_signed, result.is_verified) == (True, True)
    assert verify_signature(other, "tiny-3bpw", public).kind == "signature"
    _, theirs = write_keys(tmp_path, "theirs", ec.SECP256R1())
    third = Registry(tmp_path / "third")
    with pytest.raises(SignatureError, match=r"theirs\.pub"):
        fetch(third, hub, public_key=theirs)
    assert refuses(third)
    assert not fetch_whole(third, hub).is_verified


def test_openssf_verifies_a_downloaded_folder(registry, evaluated, hub, keys, tmp_path):
    """What anyone does who has the repository and not bitsmith."""
    from model_signing import hashing, verifying

    private, public = keys
    send(registry, hub, sign_key=SignKey(private))
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
        send(registry, hub, sign_key=SignKey(private))
    hub.faults.clear()
    result = send(registry, hub, sign_key=SignKey(private))
    assert result.num_uploaded == 0
    assert len(list(hub.repos[REPO].history(result.commit))) == 2


def test_another_key_signs_anew(registry, evaluated, hub, keys, tmp_path):
    send(registry, hub, sign_key=SignKey(keys[0]), tag="first")
    other_private, other_public = write_keys(tmp_path, "next", ec.SECP384R1(), b"secret")
    send(registry, hub, sign_key=SignKey(other_private, "secret"), tag="second")
    mine = Registry(tmp_path / "mine")
    assert fetch_whole(mine, hub, revision="second", public_key=other_public).is_verified
    with pytest.raises(SignatureError, match=r"not a private key|cannot be read"):
        send(registry, hub, sign_key=SignKey(other_private, "wrong"), tag="third")


def test_a_signature_of_the_registry_is_published_too(registry, evaluated, hub, other, keys):
    """It was made where the key is, and covers the version's own files."""
    private, public = keys
    sign_version(registry, "tiny", private)
    assert send(registry, hub).is_signed
    assert fetch_whole(other, hub, public_key=public).is_verified


def test_a_version_that_was_changed_with_its_manifest_has_no_signature(
    registry, evaluated, hub, other, keys, make_folder
):
    private, public = keys
    send(registry, hub, sign_key=SignKey(private))
    forged = Artifact.create("checkpoint", {"config.json": FileEntry.of_bytes(b"evil")})
    card = FileEntry.of_bytes(CARD.encode())
    change(hub, "config.json", b"evil")
    change(hub, MANIFEST, Manifest(forged, None, (), card).to_json().encode())
    with pytest.raises(SignatureError):
        fetch(other, hub, public_key=public)
    assert refuses(other)


def test_an_unsigned_version_is_refused_where_a_key_is_given(registry, version, hub, other, keys):
    send(registry, hub)
    with pytest.raises(SignatureError, match="it has none"):
        fetch(other, hub, public_key=keys[1])
    assert refuses(other)


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b'{"dsseEnvelope": {"payload": "bm8="}}', b"\xff"])
def test_a_signature_that_is_none(registry, version, hub, other, keys, content):
    send(registry, hub)
    change(hub, SIGNATURE, content)
    with pytest.raises(SignatureError):
        fetch(other, hub, public_key=keys[1])
    assert refuses(other)


def test_a_changed_card_is_found(registry, version, hub, other):
    send(registry, hub)
    change(hub, "README.md", CARD.encode() + b"<script>alert(1)</script>")
    with pytest.raises(IntegrityError, match=r"README\.md"):
        fetch(other, hub)
    assert refuses(other)


# Manifests and files


@pytest.mark.parametrize(
    "path", ["pytorch_model.bin", "model.pkl", "a/b.PT", "x.ckpt", "modeling_evil.py", "run.sh", "lib.so", "n.npy"]
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


# Layout by branches


def test_versions_side_by_side_on_branches(registry, version, hub, other, make_folder):
    registry.publish("small", registry.add_artifact("checkpoint", make_folder({"config.json": b"small"})))
    first = send(registry, hub, branch="3bpw")
    second = send(registry, hub, "small", branch="2bpw")
    repo = hub.repos[REPO]
    assert (first.tag, second.tag) == ("3bpw-v1", "2bpw-v1")
    assert repo.tags == {"3bpw-v1": first.commit, "2bpw-v1": second.commit}
    assert set(repo.branches) == {"main", "3bpw", "2bpw"}
    assert set(hub.head(REPO)) == {".gitattributes"}
    assert fetch(other, hub, revision="3bpw").digest == version.digest
    assert str(fetch(other, hub, revision="2bpw-v1", name="small")) == "small:1"
    assert "model.safetensors" not in repo.commits[second.commit]


def test_a_repository_of_branches_says_which_it_has(registry, version, hub, other):
    send(registry, hub, branch="3bpw")
    with pytest.raises(NotPublishedError, match=r"such as alice/tiny-3bpw@3bpw"):
        fetch(other, hub)


@pytest.mark.parametrize("name", ["", "a b", "../x", "bitsmith-staging-1", "x" * 200, "ref:1"])
def test_names_of_branches_and_tags_are_checked_before_anything_is_sent(registry, version, hub, name):
    for wrong in ({"branch": name}, {"tag": name or " "}):
        with pytest.raises(InvalidNameError):
            send(registry, hub, **wrong)
    assert hub.requests == []


def test_a_tag_of_ones_own(registry, version, hub, other):
    result = send(registry, hub, tag="release-3")
    assert hub.repos[REPO].tags == {"release-3": result.commit}
    assert fetch(other, hub, revision="release-3").digest == version.digest


# Without the network, and lock files


def test_offline_finds_what_was_pulled_and_asks_nobody(registry, version, hub, other):
    send(registry, hub)
    pulled = fetch(other, hub, revision="v1")
    hub.requests.clear()
    for revision in (None, "v1", hub.repos[REPO].tags["v1"]):
        result = fetch_whole(other, hub, revision=revision, offline=True)
        assert (result.version, result.num_fetched) == (pulled, 0)
    assert hub.requests == []
    with pytest.raises(NotFoundError, match="--offline"):
        fetch(other, hub, revision="v2", offline=True)


def test_offline_checks_every_file(registry, version, checkpoint, hub, other):
    send(registry, hub)
    fetch(other, hub)
    blob = other.path(checkpoint, "model.safetensors")
    blob.chmod(0o644)
    blob.write_bytes(b"x" + blob.read_bytes()[1:])
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        fetch(other, hub, offline=True)


def test_without_offline_a_dead_server_is_an_error_and_a_wrong_token_too(registry, version, hub, other):
    send(registry, hub)
    fetch(other, hub)
    with pytest.raises(HubAuthError):
        fetch(other, hub, token="hf_wrong")
    with pytest.raises(ConnectionError):
        fetch(other, hub, endpoint="http://127.0.0.1:9")


def test_a_lock_file_pins_what_is_pulled(registry, version, hub, other, tmp_path, make_folder):
    lock = tmp_path / "bitsmith.lock"
    first = send(registry, hub)
    fetch(other, hub, lock_file=lock)
    pin = json.loads(lock.read_text())["models"][REPO]
    manifest_sha256 = FileEntry.of_bytes(hub.head(REPO)[MANIFEST].content).sha256
    assert pin == {
        "name": "tiny-3bpw",
        "revision": "main",
        "commit": first.commit,
        "manifest_sha256": manifest_sha256,
    }
    registry.publish("tiny", registry.add_artifact("checkpoint", make_folder({"config.json": b"{}"})))
    send(registry, hub)
    fresh = Registry(tmp_path / "fresh")
    assert fetch(fresh, hub, lock_file=lock).digest == version.digest  # though main has moved on
    hub.requests.clear()
    assert fetch(fresh, hub, lock_file=lock).digest == version.digest
    assert hub.requests == []  # all of it is here
    with pytest.raises(PinError, match="v2 was asked for"):
        fetch(fresh, hub, lock_file=lock, revision="v2")
    assert json.loads(lock.read_text())["models"][REPO] == pin


def test_a_damaged_file_of_a_pinned_version_is_fetched_again(registry, version, checkpoint, hub, other, tmp_path):
    lock = tmp_path / "bitsmith.lock"
    send(registry, hub)
    fetch(other, hub, lock_file=lock)
    blob = other.path(checkpoint, "config.json")
    blob.chmod(0o644)
    blob.write_bytes(b"x" * 19)
    result = fetch_whole(other, hub, lock_file=lock)
    assert result.num_fetched == 1
    assert other.verify("tiny-3bpw").ok


def test_a_history_that_was_rewritten_under_a_pin_is_refused(registry, version, hub, other, tmp_path):
    lock = tmp_path / "bitsmith.lock"
    send(registry, hub)
    fetch(other, hub, lock_file=lock)
    content = json.loads(lock.read_text())
    content["models"][REPO]["manifest_sha256"] = "0" * 64
    lock.write_text(json.dumps(content))
    fresh = Registry(tmp_path / "fresh")
    with pytest.raises(PinError, match="another manifest"):
        fetch(fresh, hub, lock_file=lock)
    assert refuses(fresh)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 9}', '{"format": 1, "models": {"a/b": {"name": 1}}}'])
def test_a_damaged_lock_file_is_explained(registry, version, hub, other, tmp_path, content):
    lock = tmp_path / "bitsmith.lock"
    lock.write_text(content)
    send(registry, hub)
    with pytest.raises(PinError, match=r"bitsmith\.lock is not a lock file"):
        fetch(other, hub, lock_file=lock)
    assert lock.read_text() == content


def test_a_lock_file_keeps_the_pins_of_others(registry, version, hub, other, tmp_path):
    lock = tmp_path / "bitsmith.lock"
    theirs = {"name": "x", "revision": "v1", "commit": "1" * 40, "manifest_sha256": "2" * 64}
    lock.write_text(json.dumps({"format": 1, "models": {"bob/x": theirs}}))
    send(registry, hub)
    fetch(other, hub, lock_file=lock)
    assert json.loads(lock.read_text())["models"]["bob/x"] == theirs


def test_the_page_of_the_branches(registry, version, hub, make_folder):
    """It is made from what lies on the branches, whoever put it there."""

    def render(facts) -> str:
        return "".join(f"{branch}: {files['config.json'].decode()}\n" for branch, files in facts.items())

    overview = Overview(("config.json", "absent.json"), render)
    registry.publish("small", registry.add_artifact("checkpoint", make_folder({"config.json": b"small"})))
    send(registry, hub, branch="3bpw", overview=overview)
    send(registry, hub, "small", branch="2bpw", overview=overview)
    repo = hub.repos[REPO]
    assert set(hub.head(REPO)) == {".gitattributes", "README.md"}
    assert hub.head(REPO)["README.md"].content == b'2bpw: small\n3bpw: {"hidden_size": 64}\n'
    before = repo.branches["main"]
    send(registry, hub, "small", branch="2bpw", overview=overview)
    assert repo.branches["main"] == before


def test_main_with_a_version_is_no_page_of_branches(registry, version, hub):
    first = send(registry, hub)
    with pytest.raises(HubConflictError, match="--layout repo"):
        send(registry, hub, branch="3bpw")
    assert hub.repos[REPO].tags == {"v1": first.commit}


# Collections


def test_a_collection_lists_the_budgets_once(registry, version, hub):
    settings = {"endpoint": hub.endpoint, "token": WRITE_TOKEN, "patience": ONCE}
    page = add_to_collection(REPO, "Tiny, compressed", "3.0 bits", **settings)
    assert add_to_collection("alice/tiny-2bpw", "Tiny, compressed", "2.0 bits", **settings) == page
    assert add_to_collection(REPO, "Tiny, compressed", "3.01 bits", **settings) == page
    ((slug, collection),) = hub.collections.items()
    assert page == f"{hub.endpoint}/collections/{slug}"
    notes = {item["id"]: item["note"]["text"] for item in collection["items"]}
    assert notes == {REPO: "3.01 bits", "alice/tiny-2bpw": "2.0 bits"}
    with pytest.raises(HubAuthError, match="Tiny, compressed"):
        add_to_collection("bob/tiny", "Tiny, compressed", "x", **settings)
    with pytest.raises(HubAuthError):
        add_to_collection(REPO, "Tiny, compressed", "x", **settings | {"token": "hf_wrong"})
