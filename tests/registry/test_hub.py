"""Push and pull through the real client over HTTP: whole or not at all, and every byte checked."""

import json
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import pytest

from registry import (
    Artifact,
    HubAuthError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
    IntegrityError,
    NotPublishedError,
    Registry,
    RegistryError,
    UnsafePathError,
    push,
)
from registry.publication import MANIFEST
from registry.store import hash_file

sys.path.insert(0, str(Path(__file__).parent))
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer, Repo, StoredFile
from hub_steps import REPO, fetch, send


def is_empty(registry: Registry) -> bool:
    """Nothing was added and nothing was left lying about."""
    blobs = [path for path in (registry.root / "blobs").rglob("*") if path.is_file()]
    assert not [blob for blob in blobs if hash_file(blob).sha256 != blob.name]
    return not registry.versions() and not list((registry.root / "pulls").iterdir())


def test_what_was_pushed_is_pulled_byte_by_byte(registry, checkpoint, version, hub, other):
    result = send(registry, hub)
    repo = hub.repos[REPO]
    assert repo.tags == {"v1": result.commit}
    assert (result.tag, result.num_uploaded, result.num_unchanged) == ("v1", 5, 0)
    assert result.url == f"{hub.endpoint}/{REPO}/tree/v1"
    assert list(repo.history(repo.branches["main"]))[1:] == [next(iter(repo.commits))]  # one commit on the first
    assert list(repo.branches) == ["main"]
    assert set(hub.head(REPO)) == {*checkpoint.files, "README.md", MANIFEST, ".gitattributes"}
    assert hub.head(REPO)["model.safetensors"].is_lfs
    pulled = fetch(other, hub)
    assert str(pulled) == "tiny-3bpw:1"
    assert pulled.digest == checkpoint.digest
    assert pulled.note == f"pulled from {REPO} at {result.commit}"
    assert other.verify("tiny-3bpw").ok
    for path in checkpoint.files:
        assert other.path(checkpoint, path).read_bytes() == registry.path(checkpoint, path).read_bytes()
    assert list((other.root / "pulls").iterdir()) == []
    assert result.branch == "main"
    assert not result.is_signed


def test_the_manifest_holds_no_secret_and_no_place(registry, version, hub):
    send(registry, hub)
    manifest = hub.head(REPO)[MANIFEST].content.decode()
    assert json.loads(manifest)["artifact"]["files"]["config.json"]["size_bytes"] == 19
    assert WRITE_TOKEN not in manifest
    assert str(registry.root) not in manifest


def test_a_second_push_sends_nothing(registry, version, hub):
    first = send(registry, hub)
    hub.requests.clear()
    second = send(registry, hub)
    assert (second.commit, second.num_uploaded, second.num_unchanged) == (first.commit, 0, 5)
    assert not hub.sent("/commit/")
    assert not hub.sent("PUT")
    assert not hub.sent("/tag/")


def test_a_manifest_that_nobody_could_pull_is_not_sent(registry, version, hub, monkeypatch):
    monkeypatch.setattr("registry.publication.MOST_MANIFEST_BYTES", 100)
    with pytest.raises(RegistryError, match=r"The manifest of tiny:1 would have \d+ bytes, and 100 are the most"):
        send(registry, hub)
    assert not hub.sent("/commit/")


def test_a_push_that_died_before_the_tag_is_completed_without_a_new_commit(registry, version, hub):
    hub.faults["/tag/"] = 500
    with pytest.raises(HubUnavailableError, match="500"):
        send(registry, hub)
    assert hub.repos[REPO].tags == {}
    hub.faults.clear()
    result = send(registry, hub)
    assert result.num_uploaded == 0
    assert hub.repos[REPO].tags == {"v1": result.commit}
    assert len(list(hub.repos[REPO].history(result.commit))) == 2


def test_the_next_version_replaces_and_removes(registry, version, hub, other, make_folder):
    first = send(registry, hub)
    files = {"config.json": b"{}", "model-00001.safetensors": b"\x07" * 5000}
    registry.publish("tiny", registry.add_artifact("checkpoint", make_folder(files)))
    second = send(registry, hub)
    assert second.tag == "v2"
    assert set(hub.head(REPO)) == {*files, "README.md", MANIFEST, ".gitattributes"}
    assert hub.repos[REPO].tags == {"v1": first.commit, "v2": second.commit}
    assert fetch(other, hub, name="tiny", revision="v1").digest == version.digest
    assert str(fetch(other, hub, name="tiny")) == "tiny:2"


def test_unchanged_files_are_not_sent_again(registry, version, hub, make_folder):
    send(registry, hub)
    hub.requests.clear()
    files = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 64}
    registry.publish("tiny", registry.add_artifact("checkpoint", make_folder(files)))
    result = send(registry, hub)
    assert (result.num_uploaded, result.num_unchanged) == (2, 2)  # config and manifest; weights and card
    assert not hub.sent("PUT")


def test_a_pull_fetches_only_what_is_missing(registry, version, hub, other, make_folder):
    send(registry, hub)
    other.add_artifact("anything", make_folder({"x": bytes(range(256)) * 64}))
    hub.requests.clear()
    fetch(other, hub)
    assert hub.sent("config.json")
    assert not hub.sent("model.safetensors")


def test_a_lost_race_touches_nothing(registry, version, hub):
    def someone_else(repo: Repo, branch: str) -> None:
        hub.before_commit = lambda repo, branch: None
        repo.commit(repo.commits[repo.branches["main"]] | {"theirs": StoredFile(b"theirs", False)}, "first!")

    hub.before_commit = someone_else
    with pytest.raises(HubConflictError, match="412"):
        send(registry, hub)
    assert set(hub.head(REPO)) == {".gitattributes", "theirs"}
    assert hub.repos[REPO].tags == {}


def test_a_tag_on_other_content_is_never_moved(registry, version, hub, make_folder):
    first = send(registry, hub)
    registry.publish("rival", registry.add_artifact("checkpoint", make_folder({"config.json": b"rival"})))
    with pytest.raises(HubConflictError, match="never moved"):
        send(registry, hub, "rival")
    assert hub.repos[REPO].tags == {"v1": first.commit}
    assert hub.repos[REPO].branches["main"] == first.commit


def test_a_tag_that_appears_in_between_is_not_taken_for_ours(registry, version, hub):
    def tag_first(repo: Repo, branch: str) -> None:
        repo.tags["v1"] = repo.branches["main"]

    hub.before_commit = tag_first
    with pytest.raises(HubConflictError, match="v1 already"):
        send(registry, hub)


def test_files_of_others_are_not_mixed_with_ours(registry, version, hub):
    repo = hub.repos[REPO] = Repo(private=False)
    before = repo.commit({"model.safetensors.bak": StoredFile(b"theirs", False)}, "theirs")
    with pytest.raises(HubConflictError, match=r"model\.safetensors\.bak"):
        send(registry, hub)
    assert repo.branches["main"] == before


def test_a_private_push_does_not_go_to_a_public_repository(registry, version, hub):
    send(registry, hub)
    with pytest.raises(HubConflictError, match="public"):
        send(registry, hub, private=True)


def test_a_private_push_makes_a_private_repository(registry, version, hub):
    send(registry, hub, private=True)
    assert hub.repos[REPO].private
    with pytest.raises(HubNotFoundError):
        fetch(registry, hub, token=None)


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_a_corrupted_remote_file_is_found_at_pull(registry, version, hub, other, path):
    send(registry, hub)
    hub.corrupt(REPO, path)
    with pytest.raises(IntegrityError, match=path):
        fetch(other, hub)
    assert is_empty(other)


def test_a_server_that_stores_other_bytes_is_found_at_push(registry, version, hub, monkeypatch):
    real = StoredFile.__post_init__

    def careless(file: StoredFile) -> None:
        file.content = file.content.replace(b"64", b"65")
        real(file)

    monkeypatch.setattr(StoredFile, "__post_init__", careless)
    with pytest.raises(IntegrityError, match=r"config\.json in alice/tiny-3bpw"):
        send(registry, hub)
    assert hub.repos[REPO].tags == {}


def test_a_damaged_local_file_is_not_sent(registry, checkpoint, version, hub):
    blob = registry.path(checkpoint, "model.safetensors")
    blob.chmod(0o644)
    blob.write_bytes(b"x" + blob.read_bytes()[1:])
    with pytest.raises(IntegrityError, match="Nothing was sent"):
        send(registry, hub)
    assert set(hub.head(REPO)) == {".gitattributes"}
    assert not hub.lfs_objects


@pytest.mark.parametrize("change", ["size", "hash", "extra", "name"])
def test_a_manifest_that_lies_is_refused(registry, checkpoint, version, hub, other, change):
    send(registry, hub)
    described = json.loads(hub.head(REPO)[MANIFEST].content)
    files = described["artifact"]["files"]
    if change == "size":
        files["config.json"]["size_bytes"] += 1
    elif change == "hash":
        files["config.json"]["sha256"] = "0" * 64
    elif change == "extra":
        files["absent.json"] = files["config.json"]
    else:
        files["../../evil"] = files.pop("config.json")
    republish(hub, described)
    with pytest.raises(UnsafePathError if change == "name" else IntegrityError):
        fetch(other, hub)
    assert is_empty(other)
    assert not (other.root.parent / "evil").exists()


def republish(hub: HubServer, described: dict) -> None:
    """Commit a changed manifest, with the digest that belongs to it where it has one."""
    from registry import FileEntry

    found = described["artifact"]
    with suppress(UnsafePathError):
        entries = {path: FileEntry(**entry) for path, entry in found["files"].items()}
        artifact = Artifact.create(found["kind"], entries, found["parents"], found["metadata"])
        described["artifact"] = json.loads(artifact.to_json())
    text = json.dumps(described).encode()
    hub.repos[REPO].commit(hub.head(REPO) | {MANIFEST: StoredFile(text, False)}, "changed")


def test_files_that_the_manifest_does_not_list_are_not_fetched(registry, checkpoint, version, hub, other):
    send(registry, hub)
    repo = hub.repos[REPO]
    repo.commit(hub.head(REPO) | {"evil.pickle": StoredFile(b"cos\nsystem", False)}, "added by hand")
    hub.requests.clear()
    assert fetch(other, hub).digest == checkpoint.digest
    assert not hub.sent("evil.pickle")


def test_a_repository_without_a_manifest_is_not_ours(hub, other):
    hub.repos[REPO] = Repo(private=False)
    hub.repos[REPO].commit({"model.safetensors": StoredFile(b"weights", False)}, "theirs")
    with pytest.raises(NotPublishedError, match="from_pretrained"):
        fetch(other, hub)
    assert is_empty(other)


def test_a_warm_cache_does_not_stand_in_for_a_dead_server(registry, version, hub, other):
    send(registry, hub)
    fetch(other, hub)
    hub.faults["/revision/"] = 503
    with pytest.raises(HubUnavailableError, match="503"):
        fetch(other, hub)


def test_nothing_listens(registry, version, hub):
    with pytest.raises(HubUnavailableError, match="cannot be reached"):
        send(registry, hub, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("status", [401, 403, 409, 412, 429, 500, 503])
def test_a_failed_commit_leaves_main_and_tags_alone(registry, version, hub, status):
    expected = {401: HubAuthError, 403: HubAuthError, 409: HubConflictError, 412: HubConflictError}
    hub.faults["/commit/"] = status
    with pytest.raises(expected.get(status, HubUnavailableError), match=str(status)):
        send(registry, hub)
    assert set(hub.head(REPO)) == {".gitattributes"}
    assert hub.repos[REPO].tags == {}
    hub.faults.clear()
    assert send(registry, hub).num_uploaded == 5


def test_a_line_cut_at_the_commit_leaves_main_alone(registry, version, hub):
    def cut(repo: Repo, branch: str) -> None:
        raise ConnectionAbortedError

    hub.before_commit = cut
    with pytest.raises(HubUnavailableError, match="same command again"):
        send(registry, hub)
    assert set(hub.head(REPO)) == {".gitattributes"}
    hub.before_commit = lambda repo, branch: None
    hub.requests.clear()
    assert send(registry, hub).num_uploaded == 5
    assert not hub.sent("PUT")  # the large file had arrived the first time


@pytest.mark.parametrize(
    ("token", "kind", "words"),
    [
        (None, HubAuthError, "hf auth login"),
        ("hf_wrong_secret", HubAuthError, "HF_TOKEN"),
        (READ_TOKEN, HubAuthError, "may not write"),
    ],
)
def test_a_token_that_does_not_do_is_explained(registry, version, hub, token, kind, words):
    with pytest.raises(kind, match=words) as caught:
        send(registry, hub, token=token)
    assert "alice/tiny-3bpw" in str(caught.value)
    assert hub.repos == {}


def test_unknown_repositories_and_revisions(registry, version, hub, other):
    with pytest.raises(HubNotFoundError, match="may not see it"):
        fetch(other, hub)
    send(registry, hub)
    with pytest.raises(HubNotFoundError, match="no such revision"):
        fetch(other, hub, revision="v7")
    with pytest.raises(HubError, match="user/name"):
        push(registry, "tiny", "not a repository", endpoint=hub.endpoint, token=WRITE_TOKEN)


@pytest.mark.parametrize("word", ["/repos/create", "/revision/", "/refs", "/tree/", "/commit/", "/tag/"])
def test_no_error_shows_the_token(registry, version, hub, word):
    """The server sends the whole header back in its message, and it still does not come out."""
    hub.faults[word] = 400
    with pytest.raises(RegistryError) as caught:
        send(registry, hub)
    everything = "".join(traceback.format_exception(caught.value))
    assert WRITE_TOKEN not in everything
    assert "injected" in everything


def test_reserved_names_are_refused(registry, hub, make_folder):
    registry.publish("a", registry.add_artifact("x", make_folder({MANIFEST: b"{}"})))
    with pytest.raises(RegistryError, match=MANIFEST):
        send(registry, hub, "a")
    registry.publish("b", registry.add_artifact("x", make_folder({"README.md": b"own"})))
    with pytest.raises(RegistryError, match="Leave the card out"):
        send(registry, hub, "b")
    assert send(registry, hub, "b", card=None).num_uploaded == 2
    assert hub.head(REPO)["README.md"].content == b"own"


def test_the_token_is_taken_from_the_environment(registry, version, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    assert send(registry, hub, token=None).num_uploaded == 5
    assert "HF_TOKEN" in os.environ
