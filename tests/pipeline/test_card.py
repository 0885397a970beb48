"""The model card: a header that the Hub's client and its server take, the figures, the picture, no foreign markup."""

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from pipeline.before_after import before_after
from pipeline.card import MINIMUM_VERSIONS, collection_note, render_card, write_card
from pipeline.figures import ReportFacts, figures
from pipeline.report import write_report
from pipeline.version import VERSION
from pipeline.version_facts import VersionFacts
from registry import Artifact, FileEntry, HubError, Registry, Version, push
from tests.pipeline.report_facts import made_up_facts
from tests.pipeline.validation_server import validation_server
from tests.registry.hub_server import WRITE_TOKEN, HubServer

TRICKS = [
    "<img src=x onerror=alert(1)>|`[a](b)\n---\nlicense: mit",
    "</script><script>alert(1)</script>",
    "[a](javascript:alert(1)) javascript:alert(1) <javascript:alert(1)>",
    "![a](https://evil.example/x.png) https://evil.example <https://evil.example> www.evil.example a@evil.example",
    "name\nlicense: mit\nbase_model: evil/model\n---\n# Heading\n- list\n```\n~~~\n<b>",
    "\u2028---\u2028license: mit\u0085\r\n...\n---\n",
    "``` ` `` \\` \\| | \\\\| **bold** _it_ ~~gone~~ $x$ &lt;b&gt; &#x3c;b&#x3e; \u202egnp.exe \ud800",
    "'\"}}{{ 7*7 }}{% raw %}!!python/object:os.system *anchor &anchor",
    "x" * 100_000,
]


@pytest.fixture(scope="module")
def facts(tiny_model_dir: Path) -> ReportFacts:
    return made_up_facts(tiny_model_dir, model="user/tiny", model_commit="f" * 40)


@pytest.fixture(scope="module")
def made_report(facts: ReportFacts) -> dict[str, Any]:
    return figures(facts)


@pytest.fixture
def report(made_report: dict[str, Any]) -> dict[str, Any]:
    """report.json, to change."""
    return json.loads(json.dumps(made_report))


def _version(
    facts: ReportFacts, report: dict[str, Any] | None = None, *, report_files: tuple[str, ...] = (), **recipe: Any
) -> VersionFacts:
    """What the registry would have of a version made as `facts` say, but for `recipe`."""
    tools = {"python": "3.12.1", "torch": "2.13.0"}
    checkpoint = Artifact.create("checkpoint", {"LICENSE": FileEntry("a" * 64, 12345)}, (), {"tools": tools})
    earlier = {"num_windows": 7, "tools": tools | {"torch": "2.11.0"}}
    return VersionFacts(
        version=Version("tiny", 2, checkpoint.digest, None, "", ""),
        checkpoint=checkpoint,
        plan=facts.plan.to_json(),
        recipe=facts.recipe | recipe,
        report=report,
        report_files=frozenset(report_files),
        lineage=(checkpoint, Artifact.create("statistics", {}, (), earlier)),
    )


def _card(facts: ReportFacts, report: dict[str, Any] | None, **changes: Any) -> str:
    return render_card(_version(facts, report, **changes), "me/tiny-3.5bpw", "v2")


def _body(card: str) -> list[Token]:
    """All tokens of the Markdown."""
    text = ModelCard(card).text
    blocks = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    return [token for block in blocks for token in (block, *(block.children or ()))]


def _links(card: str) -> set[str]:
    found = {token.attrGet("href") or token.attrGet("src") for token in _body(card)}
    return {str(link) for link in found if link}


OUR_LINKS = {"https://huggingface.co/user/tiny", "https://arxiv.org/abs/2311.12023"}


def test_header(facts: ReportFacts, report: dict[str, Any]) -> None:
    data = ModelCard(_card(facts, report)).data.to_dict()
    index = data.pop("model-index")
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
    (model,) = index
    assert model["name"] == "tiny-3.5bpw"
    (result,) = model["results"]
    assert result["task"]["type"] == "text-generation"
    assert (result["dataset"]["type"], result["dataset"]["config"]) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert result["dataset"]["args"] == {
        "num_tokens": 189,
        "num_windows": 3,
        "seq_len": 64,
        "tokens_sha256": "e" * 64,
    }
    assert {metric["type"]: (metric["value"], metric["args"]["standard_error"]) for metric in result["metrics"]} == {
        "perplexity": (21.4375, 0.53125),
        "kl_divergence": (0.0625, 0.0078),
        "top1_agreement": (87.5, 1.25),
    }


def test_results_survive_the_client(facts: ReportFacts, report: dict[str, Any]) -> None:
    card = ModelCard(_card(facts, report))
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    results = again.data.eval_results
    assert [result.metric_type for result in results] == ["perplexity", "kl_divergence", "top1_agreement"]
    assert {result.dataset_name for result in results} == {"WikiText-2 raw, test"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("user/data:de", ("user/data", "user/data:de", "de", "c" * 40)),
        ("notes.txt", ("text", "notes.txt", None, None)),
        ("/home/me/secret/notes.JSONL", ("json", "notes.JSONL", None, None)),
        ("C:\\secret\\notes.parquet", ("parquet", "notes.parquet", None, None)),
    ],
)
def test_evaluation_data_are_named(facts: ReportFacts, report: Any, text: str, wanted: tuple[str | None, ...]) -> None:
    report["evaluation"] |= {"text": text, "text_commit": "c" * 40}
    card = _card(facts, report)
    assert "secret" not in card
    result = ModelCard(card).data.eval_results[0]
    named = (result.dataset_type, result.dataset_name, result.dataset_config, result.dataset_revision)
    assert named == wanted


def test_one_window_has_no_standard_error(facts: ReportFacts, report: dict[str, Any]) -> None:
    for figure in ("perplexity", "base_perplexity", "kl_divergence", "top1_agreement"):
        report["evaluation"]["report"][figure]["standard_error"] = None
    card = ModelCard(_card(facts, report))
    assert [result.metric_args for result in card.data.eval_results] == [None] * 3


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The headers that the server accepted."""
    from huggingface_hub import constants

    with validation_server() as (endpoint, headers):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield headers


def test_the_hub_takes_the_card(facts: ReportFacts, report: dict[str, Any], accepted: list[dict[str, Any]]) -> None:
    ModelCard(_card(facts, report)).validate()
    ModelCard(_card(facts, None, model="/home/me/tiny", model_commit=None)).validate()
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense: none-such\n---\n").validate()
    assert [header.get("base_model") for header in accepted] == ["user/tiny", None]


@pytest.mark.parametrize("trick", TRICKS, ids=range(len(TRICKS)))
def test_the_hub_takes_the_card_with_foreign_text(
    facts: ReportFacts, report: Any, trick: str, accepted: list[dict[str, Any]]
) -> None:
    card = ModelCard(_tricked(facts, report, trick))
    card.validate()
    assert accepted == [card.data.to_dict()]


def test_a_card_that_the_hub_refuses_ends_the_push_before_a_file_is_sent(
    facts: ReportFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    registry = Registry(tmp_path / "registry")
    version = registry.publish("tiny", _checkpoint(facts, registry, tmp_path))
    card = write_card(registry, version, "alice/tiny", "v1")
    with HubServer() as hub:
        hub.faults["/validate-yaml"] = 400
        with pytest.raises(HubError, match="400"):
            push(registry, "tiny", "alice/tiny", card=card, endpoint=hub.endpoint, token=WRITE_TOKEN)
        assert not hub.sent("/commit/")
        assert not hub.sent("/preupload/")


@pytest.mark.parametrize(
    ("dataset", "wanted"),
    [
        ("user/data", ["user/data"]),
        ("user/data:de", ["user/data"]),
        ("/home/me/a.txt", None),
        ("notes.jsonl", None),
        ("data/notes.TXT", None),
        (None, None),
    ],
)
def test_calibration_data_of_the_hub_are_named(facts: ReportFacts, dataset: str | None, wanted: Any) -> None:
    data = ModelCard(_card(facts, None, dataset=dataset)).data
    assert data.datasets == wanted
    unweighted = ModelCard(_card(facts, None, dataset=dataset, sensitivity="none")).data
    assert unweighted.datasets is None


def test_figures_are_in_the_card(facts: ReportFacts, report: dict[str, Any]) -> None:
    card = _card(facts, report)
    for label, original, compressed in before_after(report):
        assert f"| {label} | {original} | {compressed} |" in card
    assert "| perplexity | 20.12 ± 0.5 | 21.44 ± 0.53 |" in card
    for part in (
        facts.recipe["calibration_sha256"],
        facts.recipe["model_sha256"],
        "f" * 40,
        _version(facts).version.digest,
    ):
        assert part in card
    assert 'from_pretrained("me/tiny-3.5bpw", revision="v2")' in card
    assert "bitsmith pull me/tiny-3.5bpw@v2" in card
    assert "`model.layers.*.input_layernorm.weight`" in card
    assert "| seed | 0 |" in card


def test_tools_and_windows_are_those_of_the_lineage(facts: ReportFacts) -> None:
    card = _card(facts, None)
    assert "| bitsmith | `1.2.3` |" in card
    assert "| python | `3.12.1` |" in card
    assert "| torch | `2.13.0`, `2.11.0` |" in card
    assert ", 7 windows of 512 tokens |" in card
    pulled = render_card(replace(_version(facts), lineage=()), "me/tiny", "v2")
    assert "| torch |" not in pulled
    assert f", up to {facts.recipe['num_samples']} windows of 512 tokens |" in pulled


def test_it_is_installed_in_the_version_that_published_it(facts: ReportFacts, report: dict[str, Any]) -> None:
    assert f"\npip install bitsmith=={VERSION} " in _card(facts, report)


def test_the_command_names_commits(facts: ReportFacts, report: dict[str, Any]) -> None:
    report["evaluation"] |= {"text": "user/test", "text_commit": "e" * 40}
    settings = {"dataset": "user/data", "calibration_commit": "d" * 40, "eval_dataset": "user/test"}
    card = _card(facts, report, revision="main", **settings)
    command = next(line for line in card.splitlines() if line.startswith("bitsmith compress"))
    assert f"--revision {'f' * 40}" in command
    assert f"--dataset user/data --dataset-revision {'d' * 40}" in command
    assert f"--eval-dataset user/test --eval-dataset-revision {'e' * 40}" in command
    check = next(line for line in card.splitlines() if line.startswith("bitsmith evaluate"))
    assert f"--base-revision {'f' * 40} --dataset user/test --dataset-revision {'e' * 40}" in check


def test_the_picture_is_shown_if_the_report_has_it(facts: ReportFacts, report: dict[str, Any]) -> None:
    card = _card(facts, report, report_files=("heatmap.png", "report.json"))
    (image,) = [token for token in _body(card) if token.type == "image"]
    assert image.attrGet("src") == "report/heatmap.png"
    assert "bits per parameter" in image.content
    for without in (_card(facts, report, report_files=("report.json",)), _card(facts, None)):
        assert "![" not in without


def test_tables_are_whole(facts: ReportFacts, report: dict[str, Any]) -> None:
    """Every row of a table has as many cells as the row above it."""
    for card in [_card(facts, report), *(_tricked(facts, report, trick) for trick in TRICKS)]:
        previous = ""
        for line in [*card.splitlines(), ""]:
            if line.startswith("|") and previous.startswith("|"):
                assert _num_cells(line) == _num_cells(previous), line
            previous = line


def _num_cells(line: str) -> int:
    return len(re.findall(r"\|", re.sub(r"\\.", "", line)))


def test_without_a_report(facts: ReportFacts) -> None:
    card = _card(facts, None)
    data = ModelCard(card).data
    assert (data.base_model, data.license, data.eval_results) == ("user/tiny", None, None)
    assert "The quality was not measured." in card
    assert f"{facts.plan.bits_per_param:.4f} bits per parameter" in card


@pytest.mark.parametrize("model", ["/home/me/secret/tiny", "~/secret/tiny", "../secret/tiny", "D:\\secret\\tiny"])
def test_a_local_model_names_no_base_and_no_folder(facts: ReportFacts, report: dict[str, Any], model: str) -> None:
    settings = {"model": model, "model_commit": None, "dataset": "secret/a.txt", "eval_dataset": "/secret/b.txt"}
    report["evaluation"]["text"] = "/secret/b.txt"
    report["origin"] |= {"gguf_file": "/secret/tiny.gguf", "gguf_sha256": "a" * 64, "license_link": "/secret/LICENSE"}
    card = _card(facts, report, **settings)
    assert ModelCard(card).data.base_model is None
    assert "secret" not in card
    assert "bitsmith compress tiny " in card
    assert "`tiny.gguf`" in card


def _tricked(facts: ReportFacts, report: dict[str, Any], trick: str) -> str:
    """The card where every text from elsewhere is `trick`: the author's settings and an imported report."""
    names = ("base_model", "license", "license_name", "license_link", "gguf_file", "gguf_sha256")
    report["origin"] = dict.fromkeys(names, trick) | {"license": "other", "language": ["en", trick]}
    report["evaluation"] |= {"text": trick, "text_commit": trick}
    report["evaluation"]["report"]["tokens_sha256"] = trick
    report["skipped"][0] |= {"reason": trick, "names": [trick] * 6}
    report["recovery"] = {"meaning": trick}
    settings = ("model", "model_commit", "model_sha256", "dataset", "calibration_commit", "calibration_sha256")
    settings += ("recovery_sha256", "eval_dataset", "bitsmith", "seed", "num_samples", "seq_len", "recover_samples")
    changed = replace(facts, plan=replace(facts.plan, budget=trick, solver=trick, status=trick))
    version = _version(changed, report, **dict.fromkeys(settings, trick))
    plan = version.plan | {"matrices": {trick: dict(next(iter(version.plan["matrices"].values())), label=trick)}}
    noted = replace(version.lineage[0], metadata={"tools": {trick: trick}, "num_windows": trick})
    return render_card(replace(version, plan=plan, lineage=(noted,)), "me/tiny-3.5bpw", "v2")


@pytest.mark.parametrize("trick", TRICKS, ids=range(len(TRICKS)))
def test_foreign_text_cannot_become_markup(facts: ReportFacts, report: dict[str, Any], trick: str) -> None:
    card = _tricked(facts, report, trick)
    plain = _body(_tricked(facts, report, "two words"))
    tokens = _body(card)
    assert [token.type for token in tokens if token.block] == [token.type for token in plain if token.block]
    assert {token.type for token in tokens} <= {token.type for token in plain}
    assert _links(card) == OUR_LINKS - {"https://huggingface.co/user/tiny"}
    assert not re.search("[\u202e\u2028\u0085]", card)
    assert "49" not in [token.content for token in tokens]
    card.encode()
    assert len(card) < 20_000 or trick.startswith("xxx")


@pytest.mark.parametrize("trick", TRICKS, ids=range(len(TRICKS)))
def test_foreign_text_cannot_change_the_header(facts: ReportFacts, report: dict[str, Any], trick: str) -> None:
    wanted = ModelCard(_card(facts, report)).data.to_dict()
    data = ModelCard(_tricked(facts, report, trick)).data.to_dict()
    assert data.keys() <= wanted.keys() | {"language"}
    assert "base_model" not in data
    assert "license_link" not in data
    assert (data["license"], data["language"], data["tags"]) == ("other", ["en"], wanted["tags"])
    assert re.fullmatch(r"[a-z0-9.-]{1,96}", data["license_name"])
    (result,) = data["model-index"][0]["results"]
    assert "\n" not in result["dataset"]["name"]
    assert len(result["dataset"]["name"]) <= 200


@pytest.mark.parametrize(
    ("link", "is_kept"),
    [
        ("https://example.org/terms?v=1#top", True),
        ("LICENSE", True),
        ("NO_SUCH_FILE", False),
        ("javascript:alert(1)", False),
        ("JAVASCRIPT://example.org/%0aalert(1)", False),
        ("data:text/html,<script>", False),
        ("https:terms", False),
        ("https://", False),
        ("https://[bad", False),
        ("//example.org", False),
        ("file:///home/me/LICENSE", False),
        ("https://me:password@example.org", False),
        ("https://example.org/\nlicense: mit", False),
        ("https://example.org/ x", False),
        (["https://example.org"], False),
    ],
)
def test_licence_links(facts: ReportFacts, report: dict[str, Any], link: Any, is_kept: bool) -> None:
    report["origin"]["license_link"] = link
    assert ModelCard(_card(facts, report)).data.get("license_link") == (link if is_kept else None)


def test_a_licence_that_the_hub_does_not_know_is_not_stated(facts: ReportFacts, report: dict[str, Any]) -> None:
    report["origin"] |= {"license": "mit\nx: y", "license_name": "My Own"}
    data = ModelCard(_card(facts, report)).data
    assert (data.license, data.license_name, data.license_link) == (None, None, None)


def test_minimum_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for package, number in MINIMUM_VERSIONS.items():
        assert f"{package}>={number}" in project["dependencies"]


def _checkpoint(facts: ReportFacts, registry: Registry, folder: Path) -> Artifact:
    (folder / "checkpoint").mkdir()
    for name, content in {"plan.json": facts.plan.to_json(), "recipe.json": facts.recipe}.items():
        (folder / "checkpoint" / name).write_text(json.dumps(content), encoding="utf-8")
    return registry.add_artifact("checkpoint", folder / "checkpoint")


def test_card_from_the_registry_alone(facts: ReportFacts, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    checkpoint = _checkpoint(facts, registry, tmp_path)
    (tmp_path / "report").mkdir()
    write_report(facts, tmp_path / "report")
    report = registry.add_artifact("report", tmp_path / "report", (checkpoint.digest,))
    card = write_card(registry, registry.publish("tiny", checkpoint, report), "me/tiny", "v1")
    assert ModelCard(card).data.base_model == "user/tiny"
    assert 'revision="v1"' in card
    assert checkpoint.digest in card
    assert "21.44 ± 0.53" in card
    assert _links(card) == OUR_LINKS | {"report/heatmap.png"}
    pulled = write_card(registry, registry.publish("pulled", checkpoint), "me/pulled", "v1")
    assert "The quality was not measured." in pulled
    assert "report/" not in pulled


def test_collection_note(facts: ReportFacts, report: dict[str, Any]) -> None:
    measured = collection_note(_version(facts, report))
    assert measured == "3.50 bits per parameter, 12.35 kB, KL 0.062 nats/token, perplexity 21.44"
    assert collection_note(_version(facts)) == "3.50 bits per parameter, 12.35 kB"
    widest = replace(_version(facts), plan=facts.plan.to_json() | {"bits_per_param": 1e300})
    assert len(collection_note(widest)) <= 500
