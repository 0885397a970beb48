"""The report's files: self-contained, escaped, the same bytes for the same facts."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pipeline.before_after import before_after
from pipeline.figures import ReportFacts, figures
from pipeline.recovery_report import RecoveryReport
from pipeline.report import write_report
from tests.pipeline.report_facts import made_up_facts

PICTURES = ("heatmap.png", "cost_per_layer.png", "budget_curve.png")
HOSTILE = "<script>alert('x')</script>&\" onload=\"y"


@pytest.fixture(scope="module")
def facts(tiny_model_dir: Path) -> ReportFacts:
    return made_up_facts(tiny_model_dir)


@pytest.fixture(scope="module")
def folder(facts: ReportFacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    write_report(facts, path)
    return path


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def _page(folder: Path) -> _Page:
    return _Page((folder / "index.html").read_text(encoding="utf-8"))


def test_files(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"index.html", "report.json", *PICTURES}


def test_page_needs_nothing_from_outside(folder: Path) -> None:
    page = _page(folder)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    loaded = [value for _, key, value in page.attributes if key in ("src", "srcset")]
    assert len(loaded) == 2 * len(PICTURES)
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    links = {(tag, value) for tag, key, value in page.attributes if key == "href"}
    assert links == {("a", "https://arxiv.org/abs/2311.12023")}
    style = (folder / "index.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_page_shows_the_figures(facts: ReportFacts, folder: Path) -> None:
    text = " ".join(_page(folder).text.split())
    for label, original, compressed in before_after(figures(facts)):
        assert f"{label} {original} {compressed}" in text
    assert "21.44 ± 0.53" in text
    assert f"{facts.plan.bits_per_param:.4f}" in text
    assert "Light scatters, mostly." in text
    assert "bitsmith compress tiny --budget 3.5bpw" in text
    assert facts.checkpoint_digest in text
    for label in {matrix.label for matrix in facts.plan.matrices.values()}:
        assert label in text


def test_bytes_are_the_same_twice(facts: ReportFacts, folder: Path, tmp_path: Path) -> None:
    write_report(facts, tmp_path)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_wide_pngs_without_metadata(folder: Path, name: str) -> None:
    with Image.open(folder / name) as image:
        image.verify()
    with Image.open(folder / name) as image:
        assert image.format == "PNG"
        assert image.width > image.height > 300
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10  # something is drawn
        assert "Software" not in image.info


def test_report_json_is_what_the_page_shows(facts: ReportFacts, folder: Path) -> None:
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(figures(facts)))


def test_foreign_text_cannot_become_markup(facts: ReportFacts, tmp_path: Path) -> None:
    samples = {"original": HOSTILE, "compressed": HOSTILE}
    hostile = replace(
        facts,
        model=replace(facts.model, spec=HOSTILE),
        plan=replace(facts.plan, budget=HOSTILE),
        recipe=facts.recipe | {"model": HOSTILE, "dataset": HOSTILE},
        evaluation=facts.evaluation | {"prompt": HOSTILE, "samples": samples, "text": HOSTILE},
    )
    write_report(hostile, tmp_path)
    page = _page(tmp_path)
    assert "script" not in page.tags
    assert not any(key.startswith("on") for _, key, _ in page.attributes)
    assert page.text.count(HOSTILE) >= 5


@pytest.mark.parametrize(
    ("samples", "said", "quoted"),
    [
        ({"original": None, "compressed": "It scatters."}, "the original was larger than the free memory", True),
        ({"original": None, "compressed": None}, "takes many minutes for one on a CPU", False),
    ],
)
def test_a_sample_that_is_left_out_is_explained(
    facts: ReportFacts, tmp_path: Path, samples: dict[str, str | None], said: str, quoted: bool
) -> None:
    write_report(replace(facts, evaluation=facts.evaluation | {"samples": samples}), tmp_path)
    text = _page(tmp_path).text
    assert said in text
    assert ("It scatters." in text) == quoted


@pytest.mark.parametrize("sensitivity", ["kronecker", "fisher", "input", "none"])
def test_expected_divergence_stands_beside_the_measured_one_where_both_are_nats(
    sensitivity: str, facts: ReportFacts, tmp_path: Path
) -> None:
    write_report(replace(facts, recipe=facts.recipe | {"sensitivity": sensitivity}), tmp_path)
    text = " ".join(_page(tmp_path).text.split())
    told = f"{facts.plan.expected_cost:.3g} nats a token were expected"
    assert (told in text) == (sensitivity in ("kronecker", "fisher"))
    assert "the rank correlation of both over the matrices is 1.000" in text


def test_without_an_evaluation(tiny_model_dir: Path, tmp_path: Path) -> None:
    write_report(made_up_facts(tiny_model_dir, evaluated=False), tmp_path)
    text = _page(tmp_path).text
    assert "The quality was not measured" in text
    assert "There is no sample" in text
    assert "perplexity" not in text
    assert json.loads((tmp_path / "report.json").read_text())["evaluation"] is None


@pytest.mark.parametrize("has_gained", [True, False])
def test_a_recovery_is_told(has_gained: bool, facts: ReportFacts, tmp_path: Path) -> None:
    best = 0.25 if has_gained else 0.5
    recovery = RecoveryReport(
        train=("norms", "scales"),
        steps=10,
        num_train_windows=7,
        num_held_out_windows=1,
        has_gained=has_gained,
        start_kl=0.5,
        best_kl=best,
        checks=((0, 0.5), (10, best)),
    )
    assert RecoveryReport.from_json(json.loads(json.dumps(recovery.to_json()))) == recovery
    write_report(replace(facts, recovery=recovery), tmp_path)
    text = " ".join(_page(tmp_path).text.split())
    assert ("fell from 0.5 to 0.25 nats" in text) == has_gained
    assert ("the one without recovery" in text) != has_gained
    assert "10 steps on 7 windows" in text


def test_one_choice_for_all_and_no_error_can_be_drawn(facts: ReportFacts, tmp_path: Path) -> None:
    """Degenerate figures: a flat heat map, zero costs (no logarithm), one point on the curve."""
    table = replace(
        facts.table,
        choices=facts.table.choices[:1],
        cost=0 * facts.table.cost[:, :1],
        size_bits=facts.table.size_bits[:, :1],
    )
    matrices = {name: replace(matrix, label=table.choices[0], cost=0.0) for name, matrix in facts.plan.matrices.items()}
    plan = replace(facts.plan, matrices=matrices, predicted_cost=0.0, lower_bound=0.0)
    write_report(replace(facts, plan=plan, table=table, errors=dict.fromkeys(matrices, 0.0)), tmp_path)
    assert len(json.loads((tmp_path / "report.json").read_text())["curve"]["mixed"]) == 1
