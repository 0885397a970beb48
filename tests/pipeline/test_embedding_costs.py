"""Of a budget in bytes, the program decides how embeddings and head are packed."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM

from pipeline.allocation import AS_STORED, PlannedEmbedding, allocate, allocate_to_budget
from pipeline.budget import Budget
from pipeline.compress import Compressed, compress
from pipeline.costs import CostTable
from pipeline.disk_space import shared_disk_bytes
from pipeline.display import add_run_rows, new_table
from pipeline.embedding_costs import divergence_of_tables
from pipeline.embedding_steps import embedding_costs, with_costs
from pipeline.embeddings import CANDIDATES
from pipeline.errors import BudgetError, NonFiniteError
from pipeline.forecast import forecast
from pipeline.model import open_model
from pipeline.packed import load_packed
from pipeline.planning import make_plan, make_plans
from pipeline.progress import SILENT
from pipeline.recipe import Recipe
from pipeline.run import Run
from pipeline.stages import StageLog
from pipeline.sweep import compress_budgets
from quantizers.embedding import QuantizedEmbedding
from registry import Registry
from tests.architectures import build_causal
from tests.models import save_model
from tests.pipeline.small import SMALL

pytestmark = pytest.mark.usefixtures("quick")
QUICK = {"ranks": (0,), "sensitivity": "fisher", "eval_windows": 0}


def saved(model_type: str, folder: Path) -> Path:
    return save_model(build_causal(model_type), folder / "model", dtype=torch.float32)


def recipe_of(model: Path, **settings: object) -> Recipe:
    return Recipe.of(model=str(model), **(SMALL | QUICK | settings))


def opened(recipe: Recipe, folder: Path) -> Run:
    registry = Registry(folder / "registry")
    return Run.open(recipe, registry, device="cpu", resume=True, log=StageLog(), progress=SILENT)


# --- the program ---


def problem(seed: int) -> tuple[CostTable, dict[str, tuple[PlannedEmbedding, ...]]]:
    rng = np.random.default_rng(seed)
    labels = ("lloyd2-g32-s4", "lloyd3-g32-s4", "lloyd4-g32-s6")
    shapes = ((32, 64), (64, 32), (32, 32))
    sizes = np.array([[(2.1 + column) * out * width for column in range(3)] for out, width in shapes]).astype(np.int64)
    cost = np.sort(rng.random((3, 3)), axis=1)[:, ::-1].copy()
    names = tuple(f"m{row}.weight" for row in range(3))
    table = CostTable(names, names, shapes, labels, cost, sizes)
    offered = {
        module: (
            PlannedEmbedding(AS_STORED, (100, 32), 16 * 3200, 0.0),
            PlannedEmbedding("lloyd4-g32-s6", (100, 32), int(4.2 * 3200), float(rng.random()) / 4),
            PlannedEmbedding("lloyd2-g32-s4", (100, 32), int(2.2 * 3200), float(rng.random())),
        )
        for module in ("embed", "head")
    }
    return table, offered


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget_bits", [28_000, 45_000, 80_000, 130_000])
def test_it_finds_what_trying_all_finds(seed: int, budget_bits: int) -> None:
    table, offered = problem(seed)
    plan = allocate(table, budget_bits, budget="1MB", solver="highs", share_groups=False, embeddings=offered)
    best = min(
        table.cost[range(3), list(choice)].sum() + sum(each.cost for each in packed)
        for choice in itertools.product(range(3), repeat=3)
        for packed in itertools.product(*offered.values())
        if table.size_bits[range(3), list(choice)].sum() + sum(each.size_bits for each in packed) <= budget_bits
    )
    assert plan.expected_cost == pytest.approx(best, rel=1e-5)
    stored = sum(plan.embeddings[name].size_bits if name in plan.embeddings else 16 * 3200 for name in offered)
    assert plan.size_bits + stored <= budget_bits
    assert AS_STORED not in {each.label for each in plan.embeddings.values()}
    assert plan.lower_bound <= plan.predicted_cost + 1e-12
    assert plan.gap < 1e-5


def test_embeddings_with_one_choice_get_it_and_count_nowhere() -> None:
    table, offered = problem(0)
    fixed = {"embed": offered["embed"][1:2]}
    plan = allocate(table, 15_000, budget="1MB", solver="highs", share_groups=False, embeddings=fixed)
    assert plan.embeddings == {"embed": fixed["embed"][0]}
    assert replace(plan, embeddings={}) == allocate(table, 15_000, budget="1MB", solver="highs", share_groups=False)


@pytest.mark.parametrize("limit", [3600, 5000, 9000, 20_000])
def test_the_folder_keeps_within_its_bytes(limit: int) -> None:
    table, offered = problem(1)

    def folder_bytes(plan) -> int:
        stored = sum(plan.embeddings[name].size_bits if name in plan.embeddings else 16 * 3200 for name in offered)
        texts = sum(len(each.label) for each in plan.packed.values())
        return -(-(plan.size_bits + stored) // 8) + 100 + 7 * (texts % 17) + 40 * len(plan.embeddings)

    budget = Budget.parse(f"{limit}B")
    settings = {"solver": "highs", "share_groups": False, "embeddings": offered}
    plan = allocate_to_budget(table, budget, 10**6, folder_bytes, **settings)
    assert folder_bytes(plan) <= limit
    if limit == 20_000:
        assert plan.embeddings == {}
    with pytest.raises(BudgetError) as caught:
        allocate_to_budget(table, Budget.parse("1000B"), 10**6, folder_bytes, **settings)
    assert "embeddings" not in str(caught.value)


# --- the costs ---


def plain_divergence(network, weight: torch.Tensor, name: str, windows: torch.Tensor) -> float:
    parameter = network.get_parameter(name)
    before = network(windows).logits[:, :-1].double().log_softmax(-1)
    kept = parameter.detach().clone()
    parameter.copy_(weight)
    after = network(windows).logits[:, :-1].double().log_softmax(-1)
    parameter.copy_(kept)
    return float((before.exp() * (before - after)).sum(-1).mean())


@torch.no_grad()
@pytest.mark.parametrize("is_whole", [True, False])
def test_they_are_the_divergence_that_a_table_causes_alone(is_whole: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.unloaded.is_whole", lambda model, device: is_whole)
    model = open_model(str(saved("llama", tmp_path)))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (6, 16), generator=generator)
    tables = {}
    for module in ("model.embed_tokens", "lm_head"):
        stored = model.tensor(f"{module}.weight")
        for label, size in (("a", 0.02), ("b", 0.2)):
            tables[module, label] = stored + size * torch.randn(stored.shape, generator=generator)
    read = {key: (lambda table=table: table) for key, table in tables.items()}
    found = divergence_of_tables(model, read, tokens, tmp_path, device="cpu")
    network = model.load()
    for (module, label), table in tables.items():
        expected = plain_divergence(network, table, f"{module}.weight", tokens)
        assert found[module][label] == pytest.approx(expected, rel=6e-3)
    assert found["lm_head"]["a"] < found["lm_head"]["b"]


def test_windows_that_are_done_are_not_measured_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.embedding_costs.batch_of", lambda seq_len, width: 1)
    model = open_model(str(saved("qwen2", tmp_path)))
    tokens, reads = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0)), []

    def read() -> torch.Tensor:
        reads.append(1)
        if len(reads) == 2:
            raise KeyboardInterrupt
        return model.tensor("model.embed_tokens.weight") * 1.1

    tables = {("model.embed_tokens", "a"): read}
    with pytest.raises(KeyboardInterrupt):
        divergence_of_tables(model, tables, tokens, tmp_path, device="cpu")
    found = divergence_of_tables(model, tables, tokens, tmp_path, device="cpu")
    assert len(reads) == 4  # one window, one that was cut short, and the two that were missing
    other = tmp_path / "other"
    other.mkdir()
    assert divergence_of_tables(model, tables, tokens, other, device="cpu") == found


def test_windows_are_measured_one_by_one_where_memory_runs_out(tmp_path: Path, monkeypatch) -> None:
    """While a table is in the original's place, which must be as it was for the second try."""
    from pipeline import embedding_costs as module

    model = open_model(str(saved("qwen2", tmp_path)))
    tokens = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0))
    tables = {("model.embed_tokens", "a"): lambda: model.tensor("model.embed_tokens.weight") * 1.1}
    enough, asked = tmp_path / "enough", []
    enough.mkdir()
    expected = divergence_of_tables(model, tables, tokens, enough, device="cpu")
    plain = module.answers_to

    def answers_to(network, windows, what, **settings):
        asked.append(len(windows))
        if asked == [3, 3] or len(asked) == most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(network, windows, what, **settings)

    monkeypatch.setattr(module, "answers_to", answers_to)
    most = 99
    assert divergence_of_tables(model, tables, tokens, tmp_path, device="cpu") == expected
    assert asked == [3, 3, 1, 1, 1, 1, 1, 1]
    asked, most = [], 4  # one window alone is too many, too
    (tmp_path / "windows-00000.json").unlink()
    with pytest.raises(torch.OutOfMemoryError):
        divergence_of_tables(model, tables, tokens, tmp_path, device="cpu")
    assert asked == [3, 3, 1, 1]


def test_a_table_that_breaks_the_model_is_named(tmp_path: Path) -> None:
    model = open_model(str(saved("qwen2", tmp_path)))
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    tables = {("model.embed_tokens", "a"): lambda: model.tensor("model.embed_tokens.weight") * torch.inf}
    with pytest.raises(NonFiniteError, match=r"the original with model\.embed_tokens as a"):
        divergence_of_tables(model, tables, tokens, tmp_path, device="cpu")


# --- the run ---


def smallest_bytes(recipe: Recipe, folder: Path) -> int:
    """Of a folder with everything as small as it goes."""
    asked = recipe.model_copy(update={"budget": "2.7bpw", "embeddings": CANDIDATES[-1]})
    return make_plan(asked, folder / "registry").size_bytes


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "bert"])  # tied; with a head of its own; an encoder
def test_no_other_choice_of_embeddings_would_cost_less(model_type: str, tmp_path: Path) -> None:
    model = saved(model_type, tmp_path)
    recipe = recipe_of(model, candidates=("lloyd2-g32-s4", "lloyd3-g32-s4", "lloyd4-g32-s6"))
    tight = recipe.model_copy(update={"budget": f"{smallest_bytes(recipe, tmp_path) + 6000}B"})
    registry = tmp_path / "registry"
    free = make_plan(tight, registry)
    assert free.size_bytes <= Budget.parse(tight.budget).size_bytes
    assert free.plan.embeddings
    run = opened(tight, tmp_path)
    costs = {module: {each.label: each.cost for each in choices} for module, choices in offered_with_costs(run).items()}
    assert all(list(found.values()) == sorted(found.values()) for found in costs.values())  # fewer bits cost more
    for label in CANDIDATES:
        try:
            fixed = make_plan(tight.model_copy(update={"embeddings": label}), registry).plan
        except BudgetError:
            continue
        full = next(iter(fixed.embeddings.values())).label
        spent = sum(found[full] for found in costs.values())
        assert free.plan.expected_cost <= (fixed.predicted_cost + spent) * 1.05  # what surrounds it depends on the plan


def offered_with_costs(run: Run) -> dict[str, tuple[PlannedEmbedding, ...]]:
    return dict(with_costs(run, embedding_costs(run)))


@pytest.mark.parametrize("model_type", ["t5", "bart", "gemma3", "gpt2", "phi", "mixtral"])
def test_every_kind_of_model_has_costs(model_type: str, tmp_path: Path) -> None:
    run = opened(recipe_of(saved(model_type, tmp_path), budget="70%"), tmp_path)
    assert run.embeddings
    for choices in offered_with_costs(run).values():
        costs = [each.cost for each in choices]
        assert costs[0] == 0.0
        assert 0 < costs[1] < costs[-1]


def test_a_rival_whose_folder_is_too_large_is_none(tmp_path: Path) -> None:
    recipe = recipe_of(saved("qwen2", tmp_path), embeddings="none")
    size = make_plan(recipe.model_copy(update={"budget": "3bpw"}), tmp_path / "registry").size_bytes
    run = opened(recipe.model_copy(update={"budget": f"{size}B"}), tmp_path)
    plan = run.allocate(run.costs(run.statistics()))
    assert run._fits(plan)
    assert not run._fits(replace(plan, status="uniform " + "x" * 10_000))  # which plan.json has


def test_a_budget_with_room_leaves_them_as_they_are(tmp_path: Path) -> None:
    recipe = recipe_of(saved("qwen2", tmp_path), budget="10MB")
    assert make_plan(recipe, tmp_path / "registry").plan.embeddings == {}


@pytest.mark.parametrize(
    "settings",
    [{"budget": "4.5bpw"}, {"budget": "60kB", "embeddings": "none"}, {"budget": "60kB", "sensitivity": "none"}],
)
def test_where_they_are_left_nothing_is_on_offer(settings: dict[str, object], tmp_path: Path) -> None:
    run = opened(recipe_of(saved("qwen2", tmp_path), **settings), tmp_path)
    assert not any(each.name == "embeddings" for each in forecast(run))
    assert run.embeddings == {}
    assert embedding_costs(run) is None
    assert shared_disk_bytes(run) == shared_disk_bytes(replace(run, recipe=recipe_of(Path(run.recipe.model))))


def finished(recipe: Recipe, folder: Path) -> Compressed:
    return compress(recipe, Registry(folder / "registry"), folder / "out")


def test_the_checkpoint_has_them_packed_and_is_the_same_again(tmp_path: Path) -> None:
    model = saved("qwen2", tmp_path)
    recipe = recipe_of(model)
    budget = smallest_bytes(recipe, tmp_path / "first") + 12_000
    recipe = recipe.model_copy(update={"budget": f"{budget}B", "eval_windows": 2})
    first, second = (finished(recipe, tmp_path / name) for name in ("first", "second"))
    assert first.version.digest == second.version.digest
    assert (
        sum(file.stat().st_size for file in first.folder.iterdir() if file.is_file()) <= budget + 2000
    )  # report apart
    assert isinstance(load_packed(first.folder).get_input_embeddings(), QuantizedEmbedding)
    planned = json.loads((first.folder / "plan.json").read_text())["embeddings"]["model.embed_tokens"]
    assert planned["cost"] > 0
    again = finished(recipe, tmp_path / "first")
    assert again.was_finished


@pytest.mark.parametrize("resume", [True, False])
def test_budgets_of_both_kinds_share_one_measurement(resume: bool, tmp_path: Path, monkeypatch) -> None:
    model = saved("qwen2", tmp_path)
    small = smallest_bytes(recipe_of(model), tmp_path)
    recipes = [recipe_of(model, budget=each) for each in ("4.2bpw", f"{small + 4000}B", f"{small + 9000}B")]
    measured: list[int] = []

    def counted(*arguments, **settings):
        measured.append(1)
        return divergence_of_tables(*arguments, **settings)

    monkeypatch.setattr("pipeline.embedding_steps.divergence_of_tables", counted)
    sweep = compress_budgets(recipes, Registry(tmp_path / "registry"), tmp_path / "out", resume=resume)
    assert [bool(done.plan.embeddings) for done in sweep.results] == [False, True, True]
    assert len(measured) == 1
    points = json.loads((tmp_path / "out" / "pareto.json").read_text())["points"]
    for point, done in zip(sorted(points, key=lambda each: each["budget"]), sorted_by_budget(sweep), strict=True):
        assert point["predicted_cost"] == pytest.approx(done.plan.expected_cost)
    if resume:
        compress_budgets(recipes, Registry(tmp_path / "registry"), tmp_path / "again", resume=True)
        assert len(measured) == 1


def sorted_by_budget(sweep) -> list[Compressed]:
    return sorted(sweep.results, key=lambda done: done.plan.budget)


def files_of(root: Path) -> list[Path]:
    return [path for path in sorted(root.rglob("*")) if path.suffix != ".lock"]


def test_a_dry_run_leaves_nothing_and_measures_only_what_is_missing(tmp_path: Path, monkeypatch) -> None:
    model = saved("qwen2", tmp_path)
    recipe, root = recipe_of(model), tmp_path / "registry"
    made = make_plan(recipe, root)  # statistics and costs are there, what embeddings cost is not
    before = files_of(root)
    recipes = [recipe, recipe.model_copy(update={"budget": f"{made.size_bytes - 20_000}B"})]

    def never(*arguments, **settings):
        raise AssertionError("measured again")

    monkeypatch.setattr("pipeline.run.collect_statistics", never)
    monkeypatch.setattr("pipeline.run.measure_costs", never)
    plans = make_plans(recipes, root, dry_run=True)
    assert plans[1].plan.embeddings
    assert "embeddings" in {stage.name for stage in plans[1].stages}
    assert files_of(root) == before


def test_a_dry_run_after_the_tables_are_gone_leaves_nothing(tmp_path: Path) -> None:
    model = saved("qwen2", tmp_path)
    recipe, root = recipe_of(model, budget="10MB"), tmp_path / "registry"
    compress(recipe, Registry(root), tmp_path / "out")  # as they are stored, so that nothing refers to the tables
    Registry(root).collect_garbage(grace_seconds=0)
    before = files_of(root)
    assert make_plans([recipe.model_copy(update={"budget": "9MB"})], root, dry_run=True)[0].plan.embeddings == {}
    assert files_of(root) == before


def test_a_head_that_features_do_not_know_of_is_left(tmp_path: Path) -> None:
    config = build_causal("bert").config
    config.tie_word_embeddings = False
    model = save_model(BertForMaskedLM(config).eval(), tmp_path / "model", dtype=torch.float32)
    run = opened(recipe_of(model, budget="60kB"), tmp_path)
    assert set(run.embeddings) == {"bert.embeddings.word_embeddings"}
    named = opened(recipe_of(model, budget="60kB", embeddings=CANDIDATES[0]), tmp_path)
    assert "cls.predictions.decoder" in named.embeddings


def test_starting_over_measures_again(tmp_path: Path, monkeypatch) -> None:
    model = saved("qwen2", tmp_path)
    recipe = recipe_of(model, budget=f"{smallest_bytes(recipe_of(model), tmp_path) + 6000}B")
    first = opened(recipe, tmp_path)
    assert embedding_costs(first) is not None
    calls: list[int] = []

    def counted(*arguments, **settings):
        calls.append(1)
        return divergence_of_tables(*arguments, **settings)

    monkeypatch.setattr("pipeline.embedding_steps.divergence_of_tables", counted)
    for resume, expected in ((True, 0), (False, 1)):
        run = replace(first, resume=resume, log=StageLog())
        with run.log.stage("embeddings"):
            run.embedding_costs()
        assert len(calls) == expected
        assert run.log.stages[0].reused is resume


def test_forecast_disk_and_start_know_of_them(tmp_path: Path) -> None:
    model = saved("qwen2", tmp_path)
    left, free = (opened(recipe_of(model, budget="60kB", embeddings=label), tmp_path) for label in ("none", None))
    expected = {each.name: each for each in forecast(free)}
    assert expected.keys() - {each.name for each in forecast(left)} == {"embeddings"}
    assert expected["embeddings"].seconds > 0
    assert expected["embeddings"].memory_bytes > 0
    sizes = [each.size_bits // 8 for each in free.embeddings["model.embed_tokens"][1:]]
    assert shared_disk_bytes(free) - shared_disk_bytes(left) == pytest.approx(sum(sizes) + sizes[0], abs=8)
    table = new_table(title="")
    add_run_rows(table, free)
    said = dict(zip(*(column.cells for column in table.columns), strict=True))
    assert said["embeddings"].startswith("model.embed_tokens: as stored (49.15 kB) to lloyd2-g32-s6 (")
    assert said["embedding costs"].startswith("to be measured")
