"""The model card: a header that the Hub's client reads, the figures, and no foreign markup."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from pipeline.before_after import before_after
from pipeline.card import MINIMUM_VERSIONS, render_card, write_card
from pipeline.figures import ReportFacts, figures
from registry import Registry
from tests.pipeline.report_facts import made_up_facts

HOSTILE = "<img src=x>|`[a](b)\n---\nlicense: mit"


@pytest.fixture(scope="module")
def facts(tiny_model_dir: Path) -> ReportFacts:
    return made_up_facts(tiny_model_dir, model="user/tiny", model_commit="f" * 40)


def _card(facts: ReportFacts, report: dict[str, Any] | None, **recipe: Any) -> str:
    return render_card(
        plan=facts.plan.to_json(),
        recipe=facts.recipe | recipe,
        report=report,
        repo_id="me/tiny-3.5bpw",
        revision="v2",
        digest=facts.checkpoint_digest,
        size_bytes=facts.size_bytes,
    )


def test_header(facts: ReportFacts) -> None:
    data = ModelCard(_card(facts, figures(facts))).data.to_dict()
    assert data == {
        "base_model": "user/tiny",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "other",
        "license_link": "LICENSE",
        "license_name": "see-license-file",
        "pipeline_tag": "text-generation",
        "tags": ["bitsmith", "quantized", "lq-lora", f"{round(facts.plan.bits_per_param)}-bit"],
    }


@pytest.mark.parametrize(
    ("dataset", "wanted"),
    [
        ("user/data", ["user/data"]),
        ("user/data:de", ["user/data"]),
        ("/home/me/a.txt", None),
        ("notes.jsonl", None),
        (None, None),
    ],
)
def test_calibration_data_of_the_hub_are_named(facts: ReportFacts, dataset: str | None, wanted: Any) -> None:
    data = ModelCard(_card(facts, None, dataset=dataset)).data
    assert data.datasets == wanted
    unweighted = ModelCard(_card(facts, None, dataset=dataset, sensitivity="none")).data
    assert unweighted.datasets is None


def test_figures_are_in_the_card(facts: ReportFacts) -> None:
    card = _card(facts, figures(facts))
    for label, original, compressed in before_after(figures(facts)):
        assert f"| {label} | {original} | {compressed} |" in card
    assert "| perplexity | 20.12 ± 0.5 | 21.44 ± 0.53 |" in card
    for part in (
        facts.recipe["calibration_sha256"],
        facts.recipe["model_sha256"],
        "f" * 40,
        facts.checkpoint_digest,
    ):
        assert part in card
    assert 'from_pretrained("me/tiny-3.5bpw", revision="v2")' in card
    assert "bitsmith pull me/tiny-3.5bpw --revision v2" in card
    assert "model.layers.*.input_layernorm.weight" in card
    assert "| seed | 0 |" in card


def test_tables_are_whole(facts: ReportFacts) -> None:
    """Every row of a table has as many cells as the row above it."""
    previous = ""
    for line in [*_card(facts, figures(facts)).splitlines(), ""]:
        if line.startswith("|") and previous.startswith("|"):
            assert _num_cells(line) == _num_cells(previous), line
        previous = line


def _num_cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line))


def test_without_a_report(facts: ReportFacts) -> None:
    card = _card(facts, None)
    data = ModelCard(card).data
    assert (data.base_model, data.license) == ("user/tiny", None)
    assert "The quality was not measured." in card
    assert f"{facts.plan.bits_per_param:.4f} bits per parameter" in card


def test_a_local_model_names_no_base_and_no_folder(facts: ReportFacts) -> None:
    report = figures(facts)
    card = _card(facts, report, model="/home/me/secret/tiny", model_commit=None)
    assert ModelCard(card).data.base_model is None
    assert "secret" not in card
    assert "bitsmith compress tiny " in card


def test_foreign_text_cannot_become_markup(facts: ReportFacts) -> None:
    hostile = replace(
        facts,
        model=replace(facts.model, spec=HOSTILE),
        plan=replace(facts.plan, budget=HOSTILE),
        evaluation=facts.evaluation | {"text": HOSTILE},
    )
    card = _card(hostile, figures(hostile), model=HOSTILE, model_commit=None, dataset=HOSTILE)
    assert ModelCard(card).data.license == "other"
    outside_code = re.sub(r"```.*?```|(`+)(?!`).*?(?<!`)\1(?!`)", "", card, flags=re.DOTALL)
    assert "<img" not in outside_code
    assert "[a](b)" not in outside_code
    assert not re.search(r"^license: mit", card, flags=re.MULTILINE)


def test_minimum_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for package, number in MINIMUM_VERSIONS.items():
        assert f"{package}>={number}" in project["dependencies"]


def test_card_from_the_registry_alone(facts: ReportFacts, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    for kind, files in {
        "checkpoint": {"plan.json": facts.plan.to_json(), "recipe.json": facts.recipe},
        "report": {"report.json": figures(facts)},
    }.items():
        (tmp_path / kind).mkdir()
        for name, content in files.items():
            (tmp_path / kind / name).write_text(json.dumps(content), encoding="utf-8")
    checkpoint = registry.add_artifact("checkpoint", tmp_path / "checkpoint")
    report = registry.add_artifact("report", tmp_path / "report", (checkpoint.digest,))
    card = write_card(registry, registry.publish("tiny", checkpoint, report), "me/tiny")
    assert ModelCard(card).data.base_model == "user/tiny"
    assert 'revision="v1"' in card
    assert checkpoint.digest in card
    assert "21.44 ± 0.53" in card
    pulled = write_card(registry, registry.publish("pulled", checkpoint), "me/pulled")
    assert "The quality was not measured." in pulled
