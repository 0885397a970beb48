"""A stranger's repository that speaks of signatures and places: none of it is believed."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from registry import (
    Artifact,
    HubConflictError,
    HubError,
    IntegrityError,
    KeySigner,
    KeyVerifier,
    Overview,
    PinError,
    Registry,
    RegistryError,
    SignatureError,
    UnsafeFileError,
    Version,
    import_version,
    pull,
    push,
    sign_version,
    signatures,
)
from registry.artifact import FileEntry, canonical_json
from registry.patience import ONCE
from registry.pins import Pin, read_pin, write_pin
from registry.publication import MANIFEST, SIGNATURE
from registry.signing import verify_artifact

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer, Repo, StoredFile
from hub_steps import CARD, REPO, fetch, fetch_whole, send
from keys import write_keys

THEIRS = "mallory/tiny"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "ours", ec.SECP256R1())


def describe(artifact: Artifact, report: Artifact | None = None, lineage: tuple[Artifact, ...] = ()) -> bytes:
    """A manifest that no honest push writes."""
    plain = {
        "format": 1,
        "artifact": json.loads(artifact.to_json()),
        "report": json.loads(report.to_json()) if report else None,
        "lineage": [json.loads(each.to_json()) for each in lineage],
        "card": None,
    }
    return canonical_json(plain).encode()


def publish(hub: HubServer, repo_id: str, files: dict[str, bytes]) -> str:
    stored = {path: StoredFile(content, len(content) >= 1000) for path, content in files.items()}
    hub.repos.setdefault(repo_id, Repo(private=False))
    return hub.repos[repo_id].commit(stored, "by hand")


def contents(hub: HubServer, repo_id: str = REPO) -> dict[str, bytes]:
    return {path: file.content for path, file in hub.head(repo_id).items()}


def theirs(registry: Registry, hub: HubServer, **changes) -> Version:
    settings = {"endpoint": hub.endpoint, "token": READ_TOKEN, "patience": ONCE, "name": "theirs"} | changes
    return pull(THEIRS, registry, **settings).version


@pytest.mark.parametrize("kind", ["signature", "publication"])
@pytest.mark.parametrize("place", ["artifact", "report", "lineage"])
def test_a_manifest_brings_no_signature_and_no_place(hub: HubServer, other: Registry, kind: str, place: str) -> None:
    """Else a stranger's "report" could be the genuine signature, or say that his version is another's."""
    files = {"config.json": b"evil"}
    entries = {path: FileEntry.of_bytes(content) for path, content in files.items()}
    metadata = {"repo_id": REPO, "revision": "main", "commit": "1" * 40}
    own = Artifact.create(kind if place == "artifact" else "checkpoint", entries, (), metadata)
    claim = Artifact.create(kind, entries, [own.digest], metadata)
    if place == "lineage":
        parent = Artifact.create(kind, {}, ["ab" * 32], metadata)
        own = Artifact.create("checkpoint", entries, [parent.digest])
        manifest = describe(own, None, (parent,))
    else:
        manifest = describe(own, claim if place == "report" else None)
    publish(hub, THEIRS, files | {MANIFEST: manifest} | {f"report/{path}": content for path, content in files.items()})
    with pytest.raises(IntegrityError, match=kind):
        theirs(other, hub)
    assert not other.versions()
    assert other._index.digests() == []


@pytest.mark.parametrize(
    "path", [".git/config", ".GIT/hooks/x", "a/.gitattributes", ".github/workflows/x", ".gitignore"]
)
def test_what_git_reads_and_signatures_leave_out_is_refused(hub: HubServer, other: Registry, path: str) -> None:
    entry = FileEntry.of_bytes(b"x")
    publish(hub, THEIRS, {path: b"x", MANIFEST: describe(Artifact.create("checkpoint", {path: entry}))})
    with pytest.raises(UnsafeFileError, match="git"):
        theirs(other, hub)
    assert not other.versions()


def test_a_signature_holds_for_no_file_that_it_leaves_out(
    registry: Registry, version: Version, keys, make_folder
) -> None:
    """The OpenSSF's tools leave out what git reads, so that one could be added under a signature that is genuine."""
    private, public = keys
    bundle = registry.path(sign_version(registry, "tiny", KeySigner(private)), SIGNATURE).read_bytes()
    genuine = registry.get(version.digest)
    more = registry.add_artifact("x", make_folder({".git/config": b"evil"}))
    forged = Artifact.create("checkpoint", {**genuine.files, **more.files})
    registry.record(forged)
    signature = registry.add_artifact("signature", make_folder({SIGNATURE: bundle}), [forged.digest])
    with pytest.raises(SignatureError, match="leaves out"):
        verify_artifact(registry, forged, KeyVerifier(public), "forged", [signature])


def test_a_signature_does_not_bring_its_own_weights(registry: Registry, version: Version, keys, make_folder) -> None:
    """Files beside the version's own may not take their place; nor may laying them out write into the store."""
    private, public = keys
    bundle = registry.path(sign_version(registry, "tiny", KeySigner(private)), SIGNATURE).read_bytes()
    genuine = registry.get(version.digest)
    folder = make_folder({"config.json": b"evil", "tables/plan.json": b"evil", "model.safetensors": b"evil"})
    forged = registry.add_artifact("checkpoint", folder)
    crafted = Artifact.create("signature", {SIGNATURE: FileEntry.of_bytes(bundle), **genuine.files}, [forged.digest])
    with pytest.raises(SignatureError, match="no signature of this version"):
        verify_artifact(registry, forged, KeyVerifier(public), "forged", [crafted])
    registry.publish("forged", forged)
    assert registry.verify("forged").ok
    assert registry.verify("tiny").ok


def test_a_signature_from_here_does_not_vouch_for_a_strangers_report(registry, hub, other, keys, make_folder) -> None:
    private, public = keys
    made = registry.add_artifact("checkpoint", make_folder({"config.json": b"{}"}))
    report = registry.add_artifact("report", make_folder({"report.json": b'{"kld": 1}'}), [made.digest])
    registry.publish("tiny", made, report)
    send(registry, hub, signer=KeySigner(private))
    fetch(other, hub, verifier=KeyVerifier(public))
    forged = b'{"kld": 0}'
    lie = Artifact.create("report", {"report.json": FileEntry.of_bytes(forged)}, [made.digest])
    publish(hub, THEIRS, {"config.json": b"{}", "report/report.json": forged, MANIFEST: describe(made, lie)})
    with pytest.raises(SignatureError, match="it has none"):
        theirs(other, hub, verifier=KeyVerifier(public))
    assert [version.name for version in other.versions()] == ["tiny-3bpw"]


def test_what_a_signature_does_not_speak_of_is_left_out_where_a_key_is_given(registry, hub, other, keys, make_folder):
    """`registry sign` knows of no report; what lies beside the signed files may be anybody's."""
    private, public = keys
    made = registry.add_artifact("checkpoint", make_folder({"config.json": b"{}"}))
    report = registry.add_artifact("report", make_folder({"report.json": b"{}"}), [made.digest])
    registry.publish("tiny", made, report)
    sign_version(registry, "tiny", KeySigner(private))
    send(registry, hub)
    result = fetch_whole(other, hub, verifier=KeyVerifier(public))
    assert result.is_verified
    assert result.version.report_digest is None


def test_a_report_from_a_pull_without_a_key_is_not_vouched_for_later(registry, hub, other, keys, make_folder) -> None:
    private, public = keys
    made = registry.add_artifact("checkpoint", make_folder({"config.json": b"{}"}))
    report = registry.add_artifact("report", make_folder({"report.json": b'{"kld": 1}'}), [made.digest])
    registry.publish("tiny", made, report)
    send(registry, hub, signer=KeySigner(private))
    forged = b'{"kld": 0}'
    lie = Artifact.create("report", {"report.json": FileEntry.of_bytes(forged)}, [made.digest])
    publish(hub, THEIRS, {"config.json": b"{}", "report/report.json": forged, MANIFEST: describe(made, lie)})
    assert theirs(other, hub, name="tiny").report_digest == lie.digest
    with pytest.raises(SignatureError, match="report that the signature does not speak of"):
        fetch(other, hub, name="tiny", verifier=KeyVerifier(public))
    with pytest.raises(SignatureError, match="report that the signature"):
        theirs(other, hub, name="tiny", verifier=KeyVerifier(public), offline=True)
    assert fetch(other, hub, name="sound", verifier=KeyVerifier(public)).report_digest == report.digest


def test_a_pull_that_fails_its_check_leaves_no_signature_behind(registry, version, hub, other, keys, tmp_path) -> None:
    private, _ = keys
    send(registry, hub, signer=KeySigner(private))
    _, wrong = write_keys(tmp_path, "wrong", ec.SECP256R1())
    with pytest.raises(SignatureError):
        fetch(other, hub, verifier=KeyVerifier(wrong))
    assert signatures(other, version.digest) == []


def test_an_import_brings_no_place_either(registry, version, tmp_path, other) -> None:
    import io
    import tarfile

    own = registry.get(version.digest)
    claim = Artifact.create("publication", {}, [own.digest], {"repo_id": REPO})
    head = {
        "format": 1,
        "version": {
            "name": "tiny",
            "number": 1,
            "digest": own.digest,
            "report_digest": None,
            "created_at": "2026-11-24T00:00:00+00:00",
            "note": "",
        },
        "signatures": [],
    }
    members = {"bitsmith-export.json": canonical_json(head).encode()}
    members |= {f"artifacts/{each.digest}.json": each.to_json().encode() for each in (own, claim)}
    members |= {f"blobs/{e.sha256}": registry.store.path(e.sha256).read_bytes() for e in own.files.values()}
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(RegistryError, match="publication"):
        import_version(other, tmp_path / "evil.tar")
    assert not other.versions()


# A tag that is there, pages of others, files of several processes


def test_a_tag_without_a_signature_is_not_said_to_be_signed(registry, version, hub, other, keys) -> None:
    send(registry, hub)
    with pytest.raises(HubConflictError, match="v1 already"):
        send(registry, hub, signer=KeySigner(keys[0]))
    assert not send(registry, hub).is_signed


def test_a_push_notes_the_manifest_that_lies_there(registry, version, hub, tmp_path) -> None:
    """A card that was made anew since the tag gives another manifest, which lies nowhere."""
    lock = tmp_path / "bitsmith.lock"
    send(registry, hub)
    result = send(registry, hub, card=CARD + "newer\n")
    assert result.num_uploaded == 0
    fetch(registry, hub, revision="v1", offline=True, lock_file=lock)
    there = FileEntry.of_bytes(contents(hub)[MANIFEST]).sha256
    assert read_pin(lock, REPO).manifest_sha256 == there
    assert fetch(Registry(tmp_path / "fresh"), hub, lock_file=lock).digest == version.digest


def test_a_strangers_page_is_no_page_of_branches(registry, version, hub) -> None:
    publish(hub, REPO, {"model.safetensors": b"theirs", "README.md": b"# my own page"})
    with pytest.raises(HubConflictError, match="did not publish"):
        send(registry, hub, branch="3bpw", overview=Overview((), lambda facts: "# overview"))
    assert contents(hub)["README.md"] == b"# my own page"
    assert hub.repos[REPO].tags == {}


def test_a_page_that_cannot_be_made_leaves_the_version_published(registry, version, hub) -> None:
    def render(facts) -> str:
        raise RegistryError("branch x is odd")

    with pytest.raises(RegistryError, match="branch x is odd"):
        send(registry, hub, branch="3bpw", overview=Overview((), render))
    assert set(hub.repos[REPO].tags) == {"3bpw-v1"}
    assert fetch(registry, hub, revision="3bpw-v1", offline=True, name="tiny") == version


def test_a_damaged_manifest_on_main_is_explained_to_who_pushes(registry, version, hub, make_folder) -> None:
    send(registry, hub)
    publish(hub, REPO, contents(hub) | {MANIFEST: b"{}"})
    registry.publish("tiny", registry.add_artifact("checkpoint", make_folder({"config.json": b"{}"})))
    with pytest.raises(HubConflictError, match=r"damaged .* Remove it"):
        send(registry, hub)


def test_many_processes_pin_at_once(tmp_path: Path) -> None:
    lock = tmp_path / "bitsmith.lock"
    pin = Pin("x", "v1", "1" * 40, "2" * 64)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_pin(lock, f"user/{number}", pin), range(24)))
    assert len(json.loads(lock.read_text())["models"]) == 24
    with pytest.raises(PinError, match="has come to pin"):
        write_pin(lock, "user/3", Pin("x", "v2", "3" * 40, "4" * 64))
    assert read_pin(lock, "user/3") == pin


def test_what_is_left_of_a_download_needs_no_space_again(
    registry, version, checkpoint, hub, other, monkeypatch
) -> None:
    send(registry, hub)
    entry = checkpoint.files["model.safetensors"]
    part = other.root / "pulls" / f"{entry.sha256}.part"
    part.parent.mkdir()
    part.write_bytes(registry.store.path(entry.sha256).read_bytes()[:16000])
    free = entry.size_bytes - 16000 + 2000
    monkeypatch.setattr("registry.hub_pull.shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))
    assert fetch(other, hub).digest == version.digest


def test_too_little_space_is_said_before_anything_is_fetched(registry, version, hub, other, monkeypatch) -> None:
    send(registry, hub)
    monkeypatch.setattr("registry.hub_pull.shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(RegistryError, match="100 free"):
        fetch(other, hub)
    assert not hub.sent("config.json")


def test_offline_says_what_is_damaged_and_knows_other_names(
    registry, version, checkpoint, hub, other, tmp_path
) -> None:
    lock = tmp_path / "bitsmith.lock"
    send(registry, hub)
    fetch(other, hub, lock_file=lock)
    assert str(fetch(other, hub, offline=True, name="two")) == "two:1"
    blob = other.path(checkpoint, "config.json")
    blob.chmod(0o644)
    blob.write_bytes(b"x" * 19)
    with pytest.raises(IntegrityError, match=r"config\.json"):
        fetch(other, hub, offline=True, lock_file=lock)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:abc", "http://[::1", "nonsense"])
def test_an_endpoint_that_is_none(registry, version, endpoint) -> None:
    with pytest.raises(HubError) as caught:
        push(registry, "tiny", REPO, endpoint=endpoint, token=WRITE_TOKEN, patience=ONCE)
    assert WRITE_TOKEN not in str(caught.value)


def test_a_token_with_a_line_break_is_not_shown(registry, version, hub) -> None:
    with pytest.raises(HubError) as caught:
        send(registry, hub, token="hf_secret\nxyz")
    assert "hf_secret" not in str(caught.value)
    assert send(registry, hub, token=f"{WRITE_TOKEN}\n").tag == "v1"
