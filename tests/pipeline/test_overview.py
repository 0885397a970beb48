"""The page that compares the branches of a repository, made from bytes that came from a server."""

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from pipeline.figures import ReportFacts, figures
from pipeline.overview import branch_overview, render_overview
from registry import Artifact, IntegrityError, InvalidDescriptionError, RegistryError
from registry.artifact import FileEntry
from registry.publication import MANIFEST, Manifest
from tests.pipeline.report_facts import made_up_facts


@pytest.fixture(scope="module")
def facts(tiny_model_dir: Path) -> ReportFacts:
    return made_up_facts(tiny_model_dir, model="user/tiny", model_commit="f" * 40)


def branch(facts: ReportFacts, *, with_report: bool = True, size_bytes: int = 1000, **recipe: Any) -> dict[str, bytes]:
    """What lies on a branch, as far as the page asks for it."""
    own = {
        "plan.json": json.dumps(facts.plan.to_json()).encode(),
        "recipe.json": json.dumps(facts.recipe | recipe).encode(),
    }
    entries = {path: FileEntry.of_bytes(content) for path, content in own.items()}
    weights = {"model.safetensors": FileEntry("ab" * 32, size_bytes)}
    checkpoint = Artifact.create("checkpoint", entries | weights)
    report = json.dumps(figures(facts)).encode()
    made = Artifact.create("report", {"report.json": FileEntry.of_bytes(report)}, [checkpoint.digest])
    manifest = Manifest(checkpoint, made if with_report else None, (), None)
    return own | {MANIFEST: manifest.to_json().encode()} | ({"report/report.json": report} if with_report else {})


def rows(page: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| [")]


def test_branches_side_by_side_the_smallest_first(facts: ReportFacts) -> None:
    branches = {"4bpw": branch(facts, size_bytes=9000), "2bpw": branch(facts, size_bytes=5000)}
    page = render_overview("me/tiny", branches)
    found = rows(page)
    assert [row[0].split("]")[0] for row in found] == ["[2bpw", "[4bpw"]
    assert all("-" not in row[1:] for row in found)
    assert 'branch = "4bpw"' in page
    assert "| original |" in page


def test_figures_of_different_texts_are_not_compared(facts: ReportFacts) -> None:
    assert facts.evaluation is not None
    other = copy.deepcopy(facts.evaluation)
    other["report"]["tokens_sha256"] = "0" * 64
    branches = {"4bpw": branch(facts), "2bpw": branch(dataclasses.replace(facts, evaluation=other))}
    page = render_overview("me/tiny", branches)
    assert all(row[3:] == [] for row in rows(page))
    assert "| original |" not in page
    assert "measured on different texts" in page
    assert "different texts" not in render_overview("me/tiny", {"4bpw": branch(facts), "2bpw": branch(facts)})


def test_a_version_without_a_report_has_no_quality(facts: ReportFacts) -> None:
    page = render_overview("me/tiny", {"2bpw": branch(facts, with_report=False)})
    assert rows(page)[0][3:] == []
    assert "| original |" not in page


def test_the_header_speaks_of_no_single_budget(facts: ReportFacts) -> None:
    card = ModelCard(render_overview("me/tiny", {"2bpw": branch(facts), "4bpw": branch(facts)}))
    header = card.data.to_dict()
    assert header["base_model_relation"] == "quantized"
    assert header["library_name"] == "transformers"
    assert "model-index" not in header
    assert not [tag for tag in header["tags"] if tag.endswith("-bit")]


def test_equal_branches_give_an_equal_page(facts: ReportFacts) -> None:
    mine, theirs = branch(facts), branch(facts, size_bytes=2000)
    assert render_overview("me/t", {"a": mine, "b": theirs}) == render_overview("me/t", {"b": theirs, "a": mine})


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", "[x](javascript:alert(1))", "a\n---\nlicense: mit", "|"])
def test_foreign_text_is_no_markup(facts: ReportFacts, evil: str) -> None:
    page = render_overview("me/tiny", {"2bpw": branch(facts, model=f"/x/{evil}", model_commit=None)})
    _, header, body = page.split("---\n", 2)
    seen = MarkdownIt("commonmark").render(body)
    assert "<script" not in seen
    assert 'href="javascript:' not in seen
    assert yaml.safe_load(header).get("license") != "mit"
    assert len(rows(page)) == 1


def change(files: Mapping[str, bytes], path: str, content: bytes) -> dict[str, bytes]:
    return {**files, path: content}


def test_files_that_are_not_what_the_manifest_says_are_refused(facts: ReportFacts) -> None:
    sound = branch(facts)
    for path in ("plan.json", "recipe.json", "report/report.json"):
        with pytest.raises(IntegrityError, match=path):
            render_overview("me/tiny", {"2bpw": change(sound, path, b"{}")})
    with pytest.raises(InvalidDescriptionError):
        render_overview("me/tiny", {"2bpw": change(sound, MANIFEST, b"{}")})


def test_what_push_reads_from_a_branch(facts: ReportFacts) -> None:
    overview = branch_overview("me/tiny")
    assert set(branch(facts)) == set(overview.paths)
    assert overview.render({"2bpw": branch(facts)}) == render_overview("me/tiny", {"2bpw": branch(facts)})


@pytest.mark.parametrize("path", ["plan.json", "recipe.json", "report/report.json"])
@pytest.mark.parametrize("content", [b"[1]", b'{"a": 1}', b"nonsense", b"[" * 100_000])
def test_an_odd_branch_is_named(facts: ReportFacts, path: str, content: bytes) -> None:
    """Its manifest is sound and names these bytes, which are no plan, recipe or report."""
    files = {**branch(facts), path: content}
    own = {name: FileEntry.of_bytes(files[name]) for name in ("plan.json", "recipe.json")}
    checkpoint = Artifact.create("checkpoint", own)
    report = Artifact.create("report", {"report.json": FileEntry.of_bytes(files["report/report.json"])})
    files[MANIFEST] = Manifest(checkpoint, report, (), None).to_json().encode()
    with pytest.raises(RegistryError, match="ranch odd"):
        render_overview("me/tiny", {"2bpw": branch(facts), "odd": files})
