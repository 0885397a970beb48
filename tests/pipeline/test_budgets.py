"""Many budgets on a tiny model: one measurement, a folder each, one comparison; refusals before work, kills in it."""

import json
import os
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.allocation import Plan
from pipeline.errors import (
    BudgetError,
    NonFiniteError,
    OutputExistsError,
    PipelineError,
    RecipeChangedError,
    RecipeError,
)
from pipeline.planning import make_plan, make_plans
from pipeline.progress import SILENT
from pipeline.recipe import Recipe
from pipeline.sweep import Sweep, compress_budgets, prepare_parts, prepare_runs
from registry import InvalidNameError, Registry
from registry.store import hash_file
from tests.pipeline.small import FLAGS, TEXTS, be_quick
from tests.pipeline.test_compress import contents, run, small_recipe
from tests.pipeline.test_kills import KILL_POINTS, find_owner

BUDGETS = ("4.5bpw", "100kB", "58%")
LABELS = ("4.5bpw", "100kB", "58pct")


def recipes(model: Path, budgets: tuple[str, ...] = BUDGETS, **changes: Any) -> list[Recipe]:
    return [small_recipe(model, budget=budget, **changes) for budget in budgets]


def sweep(model: Path, place: Path, budgets: tuple[str, ...] = BUDGETS, **changes: Any) -> Sweep:
    options = {key: changes.pop(key) for key in ("resume", "name", "on_start") if key in changes}
    made = recipes(model, budgets, **changes)
    return compress_budgets(made, Registry(place / "registry"), place / "out", **options)


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sweep]:
    place = tmp_path_factory.mktemp("finished")
    return place, sweep(tiny_model_dir, place)


def test_a_folder_and_a_version_a_budget(finished) -> None:
    place, done = finished
    assert [made.folder for made in done.results] == [place / "out" / label for label in LABELS]
    assert [str(made.version) for made in done.results] == [f"out-{label}:1" for label in LABELS]
    assert {path.name for path in (place / "out").iterdir()} == {*LABELS, "index.html", "pareto.json", "pareto.png"}
    by_bits, by_bytes, by_share = done.results
    assert by_bits.plan.bits_per_param <= 4.5
    assert by_bytes.size_bytes <= 100_000
    assert by_share.size_bytes <= 0.58 * 172_672


def test_statistics_and_cost_table_are_made_once(finished) -> None:
    _, done = finished
    names = [[stage.name for stage in made.stages] for made in done.results]
    assert names[0][:4] == ["open", "statistics", "costs", "embeddings"]
    assert all(rest == names[0][4:] for rest in names[1:])
    assert not done.was_finished


def test_each_folder_is_byte_for_byte_that_of_its_budget_alone(finished, tiny_model_dir: Path, tmp_path: Path) -> None:
    place, _ = finished
    alone = run(tiny_model_dir, tmp_path, budget="100kB")
    assert contents(alone.folder) == contents(place / "out" / "100kB")


def test_the_figures_are_those_of_the_results(finished) -> None:
    place, done = finished
    content = json.loads((place / "out" / "pareto.json").read_text())
    points = content["points"]
    assert [point["bits_per_param"] for point in points] == sorted(point["bits_per_param"] for point in points)
    assert {point["folder"] for point in points} == set(LABELS)
    for made in done.results:
        (point,) = (point for point in points if point["budget"] == made.plan.budget)
        assert point["bits_per_param"] == pytest.approx(made.plan.bits_per_param)
        assert point["size_bytes"] == made.size_bytes
        assert point["predicted_cost"] == pytest.approx(made.plan.expected_cost)
        assert point["perplexity"]["mean"] == pytest.approx(made.evaluation.perplexity.mean)
        assert point["kl_divergence"]["standard_error"] == pytest.approx(made.evaluation.kl_divergence.standard_error)
        assert point["top1_agreement"]["mean"] == pytest.approx(made.evaluation.top1_agreement.mean)
        assert point["checkpoint_digest"] == made.version.digest
    costs = [point["predicted_cost"] for point in points]
    assert costs == sorted(costs, reverse=True)


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attrs if key == "href"]
        self.loaded += [value or "" for key, value in attrs if key in ("src", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def test_the_page_links_every_report_and_needs_nothing_else(finished) -> None:
    place, done = finished
    page = _Page((place / "out" / "index.html").read_text(encoding="utf-8"))
    assert set(page.links) == {f"{label}/report/index.html" for label in LABELS}
    assert all((place / "out" / link).is_file() for link in page.links)
    assert len(page.loaded) == 2
    assert all(value.startswith("data:image/png;base64,") for value in page.loaded)
    text = " ".join(page.text.split())
    for made in done.results:
        assert f"{made.plan.bits_per_param:.4f}" in text
        assert made.evaluation.perplexity.text() in text
        assert made.evaluation.kl_divergence.text(".3g") in text
    with Image.open(place / "out" / "pareto.png") as image:
        assert image.width > image.height > 300
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10


def test_a_second_run_finds_everything_done_and_the_same_bytes(finished, tiny_model_dir: Path) -> None:
    place, first = finished
    before = contents(place / "out")
    again = sweep(tiny_model_dir, place)
    assert again.was_finished
    assert [made.version for made in again.results] == [made.version for made in first.results]
    assert contents(place / "out") == before


def test_another_list_adds_to_the_comparison(finished, tiny_model_dir: Path, tmp_path: Path) -> None:
    first = sweep(tiny_model_dir, tmp_path, ("3bpw", "4bpw"), eval_windows=0)
    sweep(tiny_model_dir, tmp_path, ("3.5bpw", "4bpw"), eval_windows=0)
    content = json.loads((tmp_path / "out" / "pareto.json").read_text())
    assert [point["budget"] for point in content["points"]] == ["3bpw", "3.5bpw", "4bpw"]
    assert first.results[1].version.number == 1
    assert [str(version) for version in Registry(tmp_path / "registry").versions()] == [
        "out-3.5bpw:1",
        "out-3bpw:1",
        "out-4bpw:1",
    ]
    assert all(point["perplexity"] is None for point in content["points"])
    text = (tmp_path / "out" / "index.html").read_text()
    assert "The quality was not measured" in text
    with pytest.raises(RecipeChangedError, match=r"seed was 0 and is now 1.*not compared"):
        sweep(tiny_model_dir, tmp_path, ("5bpw", "6bpw"), eval_windows=0, seed=1)
    assert not list((tmp_path / "out").glob("[56]bpw*"))


def test_every_infeasible_budget_is_named_and_nothing_is_written(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"2 of the 3 budgets.*nothing was started.*The budget 1bpw.*The budget 10kB"):
        sweep(tiny_model_dir, tmp_path, ("3bpw", "1bpw", "10kB"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "registry" / "steps").exists()


def test_one_claimed_folder_refuses_all(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "4bpw.partial").mkdir(parents=True)
    (tmp_path / "out" / "4bpw.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match=r"4bpw\.partial"):
        sweep(tiny_model_dir, tmp_path, ("3bpw", "4bpw"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["4bpw.partial"]
    assert (tmp_path / "out" / "4bpw.partial" / "thesis.txt").exists()


def test_a_foreign_folder_is_never_touched(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match=r"thesis\.txt, which was not made by bitsmith"):
        sweep(tiny_model_dir, tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_one_budget_and_several_do_not_share_a_folder(finished, tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(finished[0] / "out" / LABELS[0], tmp_path / "out")
    with pytest.raises(OutputExistsError, match="finished checkpoint of one budget"):
        sweep(tiny_model_dir, tmp_path)
    with pytest.raises(OutputExistsError, match="checkpoints of several budgets"):
        run(tiny_model_dir, finished[0])


def test_recipes_that_differ_in_more_than_the_budget_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    mixed = [small_recipe(tiny_model_dir, budget="3bpw"), small_recipe(tiny_model_dir, budget="4bpw", seed=1)]
    with pytest.raises(RecipeError, match="equal in all else"):
        compress_budgets(mixed, Registry(tmp_path / "registry"), tmp_path / "out")


def test_a_name_is_followed_by_the_budget_and_checked_first(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidNameError, match="a/b-3bpw"):
        sweep(tiny_model_dir, tmp_path, ("3bpw", "4bpw"), name="a/b")
    asked = recipes(tiny_model_dir, ("3bpw", "4bpw"))
    place = Registry(tmp_path / "registry"), tmp_path / "out"
    parts = prepare_parts(asked, *place, name="tiny", device="cpu", resume=True, progress=SILENT)
    assert [part.name for part in parts] == ["tiny-3bpw", "tiny-4bpw"]


def test_a_failure_under_way_names_the_budget_and_keeps_the_finished(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    from pipeline import sweep as module

    real, calls = module.complete, []

    def fail_at_the_second(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise NonFiniteError("the logits are not finite.")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "complete", fail_at_the_second)
    with pytest.raises(PipelineError, match=r"4bpw failed, with 1 of 2 finished: the logits"):
        sweep(tiny_model_dir, tmp_path, ("3bpw", "4bpw"), eval_windows=0)
    assert (tmp_path / "out" / "3bpw" / "report").is_dir()
    monkeypatch.undo()
    again = sweep(tiny_model_dir, tmp_path, ("3bpw", "4bpw"), eval_windows=0)
    assert [made.was_finished for made in again.results] == [True, False]


def test_starting_over_measures_once_and_spares_what_is_finished(tiny_model_dir: Path, tmp_path: Path) -> None:
    budgets = ("3bpw", "4bpw")
    done = sweep(tiny_model_dir, tmp_path, budgets, eval_windows=0, resume=False)
    assert [made.was_finished for made in done.results] == [False, False]
    with pytest.raises(OutputExistsError, match="--no-resume would make it again"):
        sweep(tiny_model_dir, tmp_path, budgets, eval_windows=0, resume=False)


def test_the_plan_before_the_run_says_what_is_reused(finished, tiny_model_dir: Path, capsys) -> None:
    from pipeline.display_sweep import show_sweep_start

    place, _ = finished
    sweep(tiny_model_dir, place, (*BUDGETS, "5bpw"), on_start=lambda parts: show_sweep_start(parts, place / "out"))
    shown = " ".join(capsys.readouterr().err.split())
    assert "statistics in the registry from an earlier run" in shown
    assert "cost table in the registry from an earlier run" in shown
    assert shown.count("nothing, finished") == 3
    assert shown.count("from the plan on") == 1


def test_plans_of_many_budgets_are_those_of_each(tiny_model_dir: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    many = make_plans(recipes(tiny_model_dir), registry)
    single = [make_plan(recipe, registry) for recipe in recipes(tiny_model_dir)]
    assert [(made.plan, made.files_bytes) for made in many] == [(made.plan, made.files_bytes) for made in single]
    dry = make_plans(recipes(tiny_model_dir), tmp_path / "none", dry_run=True)
    assert [made.plan for made in dry] == [made.plan for made in many]
    assert not (tmp_path / "none").exists()


def test_a_dry_run_changes_nothing_in_a_registry(tiny_model_dir: Path, tmp_path: Path) -> None:
    def content(folder: Path) -> dict[Path, tuple[int, bytes | None]]:
        paths = (folder, *folder.rglob("*"))
        return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths}

    measured, empty = tmp_path / "registry", tmp_path / "empty"
    empty.mkdir()
    planned = make_plans(recipes(tiny_model_dir), measured)
    for root in (measured, empty):
        before = content(root)
        dry = make_plans(recipes(tiny_model_dir), root, dry_run=True)
        assert content(root) == before
        assert [made.plan for made in dry] == [made.plan for made in planned]


def test_a_plan_with_a_cost_table_does_not_read_the_statistics(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large model they are a hundred gigabytes."""
    (recipe, *_) = recipes(tiny_model_dir)
    root = tmp_path / "registry"
    planned, hashed = make_plan(recipe, root), []
    monkeypatch.setattr("registry.step.REHASH_LIMIT_BYTES", 0)
    monkeypatch.setattr("registry.store.hash_file", lambda path: hashed.append(path) or hash_file(path))
    assert make_plan(recipe, root).plan == planned.plan
    assert hashed == []
    (statistics,) = Registry(root).of_kind("statistics")
    for entry in statistics.files.values():
        blob = Registry(root).store.path(entry.sha256)
        blob.chmod(0o644)
        blob.write_bytes(bytes(entry.size_bytes))
    assert make_plan(recipe, root).plan == planned.plan
    (run,) = prepare_runs([recipe], Registry(root), device="cpu", resume=True, progress=SILENT)
    assert run.statistics() == statistics  # whoever needs them reads them, and collects them anew
    assert len(hashed) >= len(statistics.files)
    assert Registry(root).store.is_sound(next(iter(statistics.files.values())))


def _child(model: str, place: str, home: str, kill_point: str | None) -> None:
    """One sweep in a process that kills itself at a call of the second budget."""
    import torch

    os.environ["BITSMITH_HOME"] = home
    torch.set_num_threads(1)
    be_quick()
    if kill_point is not None:
        path, name, _ = KILL_POINTS[kill_point]
        owner = find_owner(path)
        real = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            if (Path(place) / "out" / "4bpw" / "report").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, counting)
    sweep(Path(model), Path(place), ("4bpw", "3bpw"))


@pytest.mark.slow
def test_a_sweep_that_is_killed_at_the_second_budget_ends_in_the_same_bytes(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Killed three times; each run goes on from where the one before was killed."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.sweep", "tests.pipeline.test_budgets"])
    args = (str(tiny_model_dir), str(tmp_path), str(tmp_path / "home"))
    for point in ("decompose", "finish", "add report", None):
        process = context.Process(target=_child, args=(*args, point))
        process.start()
        process.join(120)
        assert process.exitcode == (-signal.SIGKILL if point else 0), point
        if point:
            assert Plan.read(tmp_path / "out" / "4bpw" / "plan.json").budget == "4bpw"
            assert not (tmp_path / "out" / "pareto.json").exists()
    sweep(tiny_model_dir, tmp_path / "unbroken", ("4bpw", "3bpw"))
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken" / "out")


def _flags(budgets: str) -> list[str]:
    flags = list(FLAGS)
    flags[flags.index("--budget") + 1] = budgets
    return flags


def test_command_line(bitsmith, tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path / "home"))
    command = ["compress", tiny_model_dir, "-o", tmp_path / "out", *_flags("3.5bpw,4.5bpw")]
    first = bitsmith(*command)
    assert first.code == 0, first.err
    assert "Plan of the run, 2 budgets" in first.err
    assert str(tmp_path / "out" / "index.html") in first.out
    facts = json.loads(bitsmith(*command, "--json", "-q").out)
    assert [fact["name"] for fact in facts] == ["out-3.5bpw", "out-4.5bpw"]
    assert all(fact["was_finished"] for fact in facts)
    assert "was finished before" in bitsmith(*command).out
    single = bitsmith("compress", tiny_model_dir, "-o", tmp_path / "out", *FLAGS)
    assert single.code == 1
    assert "holds checkpoints of several budgets" in single.err


def test_plan_command(bitsmith, tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path / "home"))
    flags = ["--rank", "2", "--num-samples", "4", "--seq-len", "32", "--candidate", "lloyd2-g32-s4", "--cost-rows", "8"]
    flags += ["--candidate", "lloyd4-g32-s6", *TEXTS]
    shown = bitsmith("plan", tiny_model_dir, "-b", "2.5bpw,100kB", *flags)
    assert shown.code == 0, shown.err
    rows = [line.split() for line in shown.out.splitlines()]
    assert [row[0] for row in rows if row and row[0] in ("2.5bpw", "100kB")] == ["2.5bpw", "100kB"]
    facts = json.loads(bitsmith("plan", tiny_model_dir, "-b", "2.5bpw,100kB", *flags, "--json", "-q").out)
    assert [fact["plan"]["budget"] for fact in facts] == ["2.5bpw", "100kB"]
    assert facts[1]["size_bytes"] <= 100_000


@pytest.mark.parametrize("budgets", ["3bpw,3.0bpw", "3bpw,,4bpw", "3bpw,4"])
def test_mistakes_in_the_list_are_told_in_one_paragraph(
    budgets: str, bitsmith, tiny_model_dir: Path, tmp_path: Path
) -> None:
    answer = bitsmith("compress", tiny_model_dir, "-o", tmp_path / "out", "-b", budgets)
    assert answer.code == 1
    assert answer.err.startswith("Error: ")
    assert len(answer.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_help_explains_several_budgets(bitsmith) -> None:
    shown = " ".join(bitsmith("compress", "--help").out.split())
    assert "Several budgets" in shown
    assert "pareto.png" in shown
