"""Where versions lie on the Hub: tags, branches with a page that compares them, collections."""

import sys
from pathlib import Path

import pytest

from registry import (
    HubAuthError,
    HubConflictError,
    InvalidNameError,
    NotPublishedError,
    Overview,
    add_to_collection,
)
from registry.patience import ONCE

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from hub_server import WRITE_TOKEN
from hub_steps import REPO, fetch, send


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
