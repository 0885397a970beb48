"""Where a model comes from: licence, languages and the id on the Hub."""

import json
from pathlib import Path

import pytest

from pipeline.origin import hub_id, model_name, read_origin, without_local_folders


@pytest.mark.parametrize(
    ("spec", "commit", "wanted"),
    [
        ("user/model", "f" * 40, "user/model"),
        ("gpt2", "f" * 40, "gpt2"),
        ("user/model", None, None),  # a folder of that name
        ("/home/me/model", None, None),
        ("user/repo/folder/model.gguf", "f" * 40, "user/repo"),
        ("demo", None, "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ],
)
def test_hub_id(spec: str, commit: str | None, wanted: str | None) -> None:
    assert hub_id(spec, commit) == wanted


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [("/home/me/llama/", "llama"), ("tiny.Q4.gguf", "tiny.Q4"), ("gpt2", "gpt2"), ("/", "/")],
)
def test_model_name_of_a_local_model(spec: str, wanted: str) -> None:
    assert model_name(spec, None) == wanted


def test_folders_of_the_author_are_cut_off() -> None:
    recipe = {
        "model": "/home/me/models/llama",
        "dataset": "~/secret/notes.txt",
        "eval_dataset": None,
        "seed": 0,
    }
    public = without_local_folders(recipe)
    assert (public["model"], public["dataset"], public["seed"]) == ("llama", "notes.txt", 0)
    relative = without_local_folders({"model": "clients/model", "model_commit": None, "dataset": "C:\\data\\a.jsonl"})
    assert (relative["model"], relative["dataset"]) == ("model", "a.jsonl")
    of_the_hub = {"model": "user/model", "model_commit": "f" * 40, "dataset": "user/data:config"}
    assert without_local_folders(of_the_hub) == of_the_hub
    assert without_local_folders({"model": "demo", "model_commit": None})["model"] == "demo"


def test_header_of_the_readme(tmp_path: Path) -> None:
    header = "license: other\nlicense_name: my-terms\nlicense_link: LICENSE\nlanguage:\n- en\n- de\n- not a code"
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# Model\n", encoding="utf-8")
    (tmp_path / "LICENSE.txt").write_text("Terms", encoding="utf-8")
    origin = read_origin("x", None, tmp_path)
    assert (origin.license, origin.license_name, origin.license_link) == ("other", "my-terms", "LICENSE.txt")
    assert origin.language == ("en", "de")


def test_gguf_states_its_licence(tmp_path: Path) -> None:
    facts = {"file": "m.gguf", "sha256": "a" * 64, "license": "Apache-2.0", "name": None}
    (tmp_path / "source.json").write_text(json.dumps(facts), encoding="utf-8")
    origin = read_origin("m.gguf", None, tmp_path)
    assert (origin.license, origin.gguf_file, origin.gguf_sha256) == ("apache-2.0", "m.gguf", "a" * 64)


def test_licence_that_the_hub_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "source.json").write_text(json.dumps({"license": "My Own / Licence v2"}), encoding="utf-8")
    origin = read_origin("m.gguf", None, tmp_path)
    assert (origin.license, origin.license_name) == ("other", "my-own-licence-v2")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("\n   Apache License\n   Version 2.0", "apache-2.0"),
        ("The MIT License (MIT)\n", "mit"),
        ("My terms\n\nThey permit licensees what the MIT License does not.", "other"),
        ("Do as you like.", "other"),
    ],
)
def test_licence_file(tmp_path: Path, text: str, wanted: str) -> None:
    (tmp_path / "LICENSE").write_text(text, encoding="utf-8")
    origin = read_origin("x", None, tmp_path)
    assert origin.license == wanted
    assert origin.license_link == ("LICENSE" if wanted == "other" else None)


@pytest.mark.parametrize("readme", ["no header", "---\n[1, 2\n---\n", "---\n- a\n- list\n---\n", "---\nlicense: [\n"])
def test_damaged_or_missing_facts_are_unknown(tmp_path: Path, readme: str) -> None:
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    (tmp_path / "source.json").write_text("[]", encoding="utf-8")
    origin = read_origin("x", None, tmp_path)
    assert origin.license is None
    assert origin.language == ()
