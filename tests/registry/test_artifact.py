"""Laws of names: equal content, equal digest; any difference, another digest; no way out of a folder."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import Artifact, FileEntry, IntegrityError, InvalidDescriptionError, UnsafePathError
from registry.artifact import canonical_json
from registry.paths import checked_path

ENTRY = FileEntry.of_bytes(b"content")
OTHER = FileEntry.of_bytes(b"contenu")

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def create(**changes) -> Artifact:
    parts = {"kind": "plan", "files": {"a": ENTRY, "b": OTHER}, "parents": ["ab" * 32], "metadata": {"x": 1}}
    return Artifact.create(**(parts | changes))


def test_the_order_of_files_and_keys_does_not_matter():
    one = create(files={"a": ENTRY, "b": OTHER}, metadata={"x": 1, "y": (2, 3)})
    two = create(files={"b": OTHER, "a": ENTRY}, metadata={"y": [2, 3], "x": 1})
    assert one == two
    assert one.digest == two.digest


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "costs"},
        {"files": {"a": OTHER, "b": ENTRY}},
        {"files": {"a": ENTRY}},
        {"parents": []},
        {"parents": ["cd" * 32]},
        {"metadata": {"x": 1.0}},
        {"metadata": {}},
    ],
)
def test_any_difference_gives_another_digest(change):
    assert create(**change) != create()


def test_the_order_of_parents_matters():
    assert create(parents=["ab" * 32, "cd" * 32]) != create(parents=["cd" * 32, "ab" * 32])


@given(st.dictionaries(st.text().filter(lambda s: s.isprintable()), JSON, max_size=4))
def test_a_description_gives_the_artifact_back(metadata):
    artifact = create(metadata=metadata)
    again = Artifact.from_json(artifact.to_json())
    assert again == artifact
    assert again.to_json() == artifact.to_json()
    assert dict(again.files) == dict(artifact.files)


def test_an_artifact_can_be_sent_to_another_process():
    again = pickle.loads(pickle.dumps(create()))
    assert again == create()
    assert dict(again.files) == dict(create().files)


def test_a_changed_description_is_noticed():
    description = json.loads(create().to_json())
    description["files"]["a"]["size_bytes"] += 1
    with pytest.raises(IntegrityError, match="description of plan"):
        Artifact.from_json(json.dumps(description))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"digest": 1}', "null", '{"digest":"x","format":99}'])
def test_what_is_no_description_is_refused(text):
    with pytest.raises(InvalidDescriptionError):
        Artifact.from_json(text)


def test_the_digest_is_the_published_one():
    """Digests are names that outlive this version of the program: changing the format must be deliberate."""
    artifact = Artifact.create("plan", {"plan.json": FileEntry("0" * 64, 3)}, ["1" * 64], {"bits": 3})
    assert artifact.to_json() == (
        '{"digest":"' + artifact.digest + '","files":{"plan.json":{"sha256":"' + "0" * 64 + '","size_bytes":3}},'
        '"format":1,"kind":"plan","metadata":{"bits":3},"parents":["' + "1" * 64 + '"]}'
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, b"bytes", {"a": {3}}, [object()]])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(TypeError):
        canonical_json(value)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "..",
        "../up",
        "a/../../b",
        "a/..",
        "/etc/passwd",
        "//host/share",
        "C:/windows",
        "c:relative",
        "a\\..\\b",
        "a//b",
        "a/",
        "./a",
        "a\x00b",
        "a\nb",
        "\udcff",
        "x" * 256,
        "a/" * 600 + "a",
    ],
)
def test_a_path_that_leaves_its_folder_is_refused(path):
    with pytest.raises(UnsafePathError):
        checked_path(path)
    with pytest.raises(UnsafePathError):
        create(files={path: ENTRY})


@pytest.mark.parametrize("path", ["a", "a/b/c.txt", ".hidden", "a..b", "...", "größe/模型.json", "with space"])
def test_an_honest_path_is_kept(path):
    assert checked_path(path) == path


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A", "a"),
        ("weights.bin", "Weights.BIN"),
        ("caf\u00e9", "cafe\u0301"),
        ("CAF\u00c9", "cafe\u0301"),
        ("stra\u00dfe", "STRASSE"),
        ("a", "a/b"),
        ("a", "a/b/c"),
        ("A", "a/b"),
        ("x/A/1", "x/a"),
    ],
)
def test_names_that_are_one_on_some_system_are_refused_together(one: str, other: str) -> None:
    for paths in ((one, other), (other, one)):
        with pytest.raises(UnsafePathError) as caught:
            create(files=dict.fromkeys(paths, ENTRY))
        assert repr(one) in str(caught.value)
        assert repr(other) in str(caught.value)


def test_names_that_only_look_alike_are_kept() -> None:
    paths = {"a/b": ENTRY, "a/c": OTHER, "ab": ENTRY, "a.b": OTHER, "b/a": ENTRY, "c/a/b": OTHER}
    assert dict(create(files=paths).files) == paths


def test_a_description_that_is_nested_without_end_is_refused() -> None:
    with pytest.raises(InvalidDescriptionError):
        Artifact.from_json("[" * 200_000)
