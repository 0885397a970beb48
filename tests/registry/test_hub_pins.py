"""Pulling without the network, and by a lock file: what was pulled before, or exactly what is pinned."""

import json
import sys
from pathlib import Path

import pytest

from registry import (
    HubAuthError,
    HubConflictError,
    IntegrityError,
    NotFoundError,
    PinError,
    Registry,
    pull,
    push,
)
from registry.artifact import FileEntry
from registry.publication import MANIFEST

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from hub_server import WRITE_TOKEN
from hub_steps import REPO, fetch, fetch_whole, send


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


def test_offline_gives_the_last_answer_also_where_main_went_back(registry, version, hub, other, make_folder):
    first = send(registry, hub)
    newer = registry.publish("tiny", registry.add_artifact("checkpoint", make_folder({"config.json": b"newer"})))
    send(registry, hub)
    assert fetch(other, hub).digest == newer.digest
    assert fetch(other, hub, revision="v1").digest == version.digest
    assert fetch(other, hub).digest == newer.digest
    num_records = len(other.of_kind("publication"))
    assert fetch(other, hub).digest == newer.digest
    assert len(other.of_kind("publication")) == num_records, "the same answer is noted once"
    hub.repos[REPO].branches["main"] = first.commit
    assert fetch(other, hub).digest == version.digest
    assert Registry.examine(other.root, repair=True) == []
    for revision in (None, "main", "v1"):
        assert fetch(Registry(other.root), hub, revision=revision, offline=True).digest == version.digest
    assert fetch(other, hub, revision="v2", name="two").digest == newer.digest
    assert fetch(other, hub, offline=True).digest == newer.digest


def test_another_owners_repository_of_the_same_name_is_refused_unless_asked_for(
    registry, version, hub, other, make_folder, tmp_path
):
    send(registry, hub)
    strange = Registry(tmp_path / "strange")
    theirs = strange.publish("tiny", strange.add_artifact("checkpoint", make_folder({"config.json": b"theirs"})))
    settings = {"endpoint": hub.endpoint, "token": WRITE_TOKEN}
    push(strange, "tiny", "alices-company/tiny-3bpw", **settings)
    mine = fetch(other, hub)
    with pytest.raises(HubConflictError, match=r"of alice/tiny-3bpw, and alices-c.* --name tiny-3bpw if"):
        pull("alices-company/tiny-3bpw", other, **settings)
    assert other.versions() == [mine]
    assert pull("alices-company/tiny-3bpw", other, name="theirs", **settings).version.digest == theirs.digest
    assert str(pull("alices-company/tiny-3bpw", other, name="tiny-3bpw", **settings).version) == "tiny-3bpw:2"
    assert pull("alices-company/tiny-3bpw", other, **settings).version.digest == theirs.digest, "it was asked for once"
    assert fetch(other, hub) == mine


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
    assert not fresh.versions()


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


def test_a_pin_means_its_own_name_and_report(registry, checkpoint, hub, other, tmp_path, make_folder):
    lock = tmp_path / "bitsmith.lock"
    report = registry.add_artifact("report", make_folder({"report.json": b"{}"}), [checkpoint.digest])
    registry.publish("reported", checkpoint, report)
    send(registry, hub, "reported")
    fetch(other, hub, lock_file=lock, name="service")
    fetch(other, hub, name="another")
    assert fetch(other, hub, lock_file=lock).name == "service"
    third = Registry(tmp_path / "third")
    registry.materialize(checkpoint, tmp_path / "same")
    same = third.add_artifact("checkpoint", tmp_path / "same", checkpoint.parents, {"bits": 3.0})
    assert same == checkpoint
    forged = third.add_artifact("report", make_folder({"report.json": b'{"forged": 1}'}), [same.digest])
    third.publish("service", same, forged)
    with pytest.raises(PinError, match="here already with another report than the lock file pins"):
        fetch(third, hub, lock_file=lock)
