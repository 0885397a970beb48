"""`watch` through the real client over HTTP: what a base was, what it is now, and what nobody could find out."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.progress import SILENT
from pipeline.sources import find_source
from pipeline.watch import BaseModelChange, watch
from registry import InvalidNameError, NotFoundError, Registry
from tests.registry.hub_server import READ_TOKEN, HubServer, Repo, StoredFile

BASE = "alice/base"
FILES = {"config.json": StoredFile(b"{}", False), "model.safetensors": StoredFile(b"\x00" * 2000, True)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """With one public base model in it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path))
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        server.repos[BASE] = Repo(private=False)
        server.repos[BASE].commit(dict(FILES), "first")
        yield server


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def publish(registry: Registry, tmp_path: Path) -> Callable[..., None]:
    """publish("tiny", model=..., revision=..., model_commit=...) -> the next version, made from that."""
    count = iter(range(1000))

    def make(name: str, **recipe: Any) -> None:
        folder = tmp_path / f"folder{next(count)}"
        folder.mkdir()
        content = {"revision": None, "model_commit": None, "budget": folder.name} | recipe
        (folder / "recipe.json").write_text(json.dumps(content), encoding="utf-8")
        registry.publish(name, registry.add_artifact("checkpoint", folder))

    return make


def _commit_of(hub: HubServer, revision: str = "main") -> str:
    found = hub.repos[BASE].resolve(revision)
    assert found is not None
    return found


def _move(hub: HubServer) -> str:
    return hub.repos[BASE].commit(FILES | {"README.md": StoredFile(b"mended", False)}, "second")


def test_unchanged_then_changed(hub, registry, publish) -> None:
    opened = find_source(BASE, None, SILENT).revision  # as compress finds and records it
    publish("tiny", model=BASE, model_commit=opened)
    before = _commit_of(hub)
    assert watch(registry) == [BaseModelChange("tiny", 1, "unchanged", BASE, "main", before, before)]
    after = _move(hub)
    (changed,) = watch(registry)
    assert changed == BaseModelChange("tiny", 1, "changed", BASE, "main", before, after)
    assert (changed.is_changed, changed.problem) == (True, None)
    publish("tiny", model=BASE, model_commit=after)
    assert watch(registry) == [BaseModelChange("tiny", 2, "unchanged", BASE, "main", after, after)]


def test_the_revision_of_the_recipe_is_asked_for(hub, registry, publish) -> None:
    first = _commit_of(hub)
    hub.repos[BASE].tags["v1"] = first
    publish("by-tag", model=BASE, revision="v1", model_commit=first)
    publish("by-commit", model=BASE, revision=first, model_commit=first)
    second = _move(hub)
    assert [change.state for change in watch(registry)] == ["unchanged", "unchanged"]
    hub.repos[BASE].tags["v1"] = second
    assert [(change.name, change.state) for change in watch(registry)] == [
        ("by-commit", "unchanged"),
        ("by-tag", "changed"),
    ]


def test_the_latest_version_from_the_hub_counts(hub, registry, publish) -> None:
    first = _commit_of(hub)
    publish("tiny", model=BASE, model_commit="0" * 40)
    publish("tiny", model=BASE, model_commit=first)
    publish("tiny", model="/home/me/tiny")
    publish("gguf", model=f"{BASE}/folder/tiny.gguf", model_commit=first)
    assert watch(registry, ["tiny"]) == [BaseModelChange("tiny", 2, "unchanged", BASE, "main", first, first)]
    assert watch(registry, ["gguf"])[0].base == BASE


def test_models_of_this_disk_are_not_asked_for(hub, registry, publish, tmp_path: Path) -> None:
    publish("local", model="/home/me/tiny")
    publish("packaged", model="demo")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    registry.publish("foreign", registry.add_artifact("checkpoint", tmp_path / "other"))
    found = watch(registry)
    assert [(change.name, change.state) for change in found] == [
        ("foreign", "not from the Hub"),
        ("local", "not from the Hub"),
        ("packaged", "not from the Hub"),
    ]
    assert all(change.is_changed is None and change.problem is None for change in found)
    assert hub.requests == []


@pytest.mark.parametrize("what", ["repository", "revision", "hidden"])
def test_gone(what: str, hub, registry, publish) -> None:
    publish("tiny", model=BASE, revision="next" if what == "revision" else None, model_commit=_commit_of(hub))
    if what == "repository":
        del hub.repos[BASE]
    hub.repos.get(BASE, Repo(False)).private = what == "hidden"
    (change,) = watch(registry)
    assert (change.state, change.is_changed, change.commit_now) == ("gone", None, None)
    assert BASE in str(change.problem)


def test_a_private_base_is_seen_with_a_token(hub, registry, publish, monkeypatch: pytest.MonkeyPatch) -> None:
    publish("tiny", model=BASE, model_commit=_commit_of(hub))
    hub.repos[BASE].private = True
    assert watch(registry, token=READ_TOKEN)[0].state == "unchanged"
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert watch(registry)[0].state == "unchanged"


@pytest.mark.parametrize(("status", "words"), [(500, "500"), (429, "429"), (403, "403")])
def test_a_refusal_is_no_answer(status: int, words: str, hub, registry, publish) -> None:
    publish("tiny", model=BASE, model_commit=_commit_of(hub))
    hub.faults["/revision/"] = status
    (change,) = watch(registry)
    assert (change.state, change.is_changed, change.commit_now) == ("not asked", None, None)
    assert words in str(change.problem)


def test_a_wrong_token_is_no_answer_and_is_not_shown(hub, registry, publish) -> None:
    publish("tiny", model=BASE, model_commit=_commit_of(hub))
    (change,) = watch(registry, token="hf_wrong_secret")
    assert change.state == "not asked"
    assert "does not know the token" in str(change.problem)
    hub.faults["/revision/"] = 500
    assert "hf_wrong_secret" not in str(watch(registry, token="hf_wrong_secret"))


def test_no_cache_answers_for_a_hub_that_is_away(hub, registry, publish, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    publish("tiny", model=BASE, model_commit=find_source(BASE, None, SILENT).revision)
    assert watch(registry)[0].state == "unchanged"
    (dead,) = watch(registry, endpoint="http://127.0.0.1:9")
    assert dead.state == "not asked"
    assert "cannot be reached" in str(dead.problem)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (offline,) = watch(registry)
    assert offline.state == "not asked"
    assert "HF_HUB_OFFLINE" in str(offline.problem)


def test_one_base_in_trouble_leaves_the_others(hub, registry, publish) -> None:
    commit = _commit_of(hub)
    for budget in ("2.5bpw", "3bpw", "4bpw"):
        publish(f"tiny-{budget}", model=BASE, model_commit=commit)
    publish("broken", model=BASE, model_commit=commit)
    publish("nameless", model=["no", "text"])
    publish("else", model="alice/else", model_commit=commit)
    digest = registry.version("broken").digest
    registry.path(registry.get(digest), "recipe.json").unlink()
    hub.requests.clear()
    states = {change.name: change.state for change in watch(registry)}
    assert states == {
        "broken": "not asked",
        "else": "gone",
        "nameless": "not asked",
        "tiny-2.5bpw": "unchanged",
        "tiny-3bpw": "unchanged",
        "tiny-4bpw": "unchanged",
    }
    assert len(hub.sent(BASE)) == 1, "three versions, one question"


def test_names(hub, registry, publish) -> None:
    publish("tiny", model=BASE, model_commit=_commit_of(hub))
    publish("other", model="/home/me/other")
    assert [change.name for change in watch(registry, ["tiny", "tiny"])] == ["tiny"]
    with pytest.raises(NotFoundError, match="nosuch"):
        watch(registry, ["tiny", "nosuch"])
    with pytest.raises(InvalidNameError, match="tiny:1"):
        watch(registry, ["tiny:1"])


def test_the_date_is_the_hubs(registry, publish, hub) -> None:
    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"id": BASE, "sha": "b" * 40, "lastModified": "2026-11-20T10:11:12.000Z"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    publish("tiny", model=BASE, model_commit="a" * 40)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        (change,) = watch(registry, endpoint=f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert (change.state, change.modified_at) == ("changed", "2026-11-20T10:11:12+00:00")


def test_command(hub, registry, publish, bitsmith) -> None:
    assert "no base to watch" in bitsmith("registry", "watch").out
    first = _commit_of(hub)
    publish("tiny", model=BASE, model_commit=first)
    publish("local", model="/home/me/local")
    second = _move(hub)
    shown = bitsmith("registry", "watch")
    assert shown.code == 0, shown.err
    for word in ("tiny:1", f"{BASE} at main", "changed", first[:12], second[:12], "local:1", "not from the Hub"):
        assert word in shown.out
    answer = bitsmith("registry", "watch", "tiny", "--json")
    assert answer.code == 0, answer.err
    (change,) = json.loads(answer.out)
    assert change == {
        "name": "tiny",
        "version": 1,
        "state": "changed",
        "base": BASE,
        "revision": "main",
        "commit_then": first,
        "commit_now": second,
        "modified_at": None,
        "is_changed": True,
        "problem": None,
    }
    assert bitsmith("registry", "watch", "--quiet").out == ""


def test_command_fails_where_the_hub_was_not_asked_and_tells_what_is_gone(hub, registry, publish, bitsmith) -> None:
    commit = _commit_of(hub)
    publish("tiny", model=BASE, model_commit=commit)
    publish("lost", model="alice/lost", model_commit=commit)
    hub.faults[f"{BASE}/revision"] = 500
    failed = bitsmith("registry", "watch", "--json")
    assert failed.code == 1
    assert {change["name"]: change["is_changed"] for change in json.loads(failed.out)} == {"lost": None, "tiny": None}
    assert "1 of 2 could not be asked: tiny." in failed.err
    hub.faults.clear()
    shown = bitsmith("registry", "watch")
    assert shown.code == 0
    assert "lost: alice/lost does not exist" in shown.out
    assert bitsmith("registry", "watch", "nosuch").code == 1
