"""The flow with several budgets: the command's bytes, and refusals before any work."""

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("quick")


def test_flow_and_function_make_the_same_folders(server: None, recipe: dict[str, Any], tmp_path: Path) -> None:
    from flows.compress import compress
    from flows.job import read_outcome
    from pipeline.planning import make_plan
    from pipeline.recipe import Recipe
    from pipeline.sweep import compress_budgets
    from registry import Registry

    whole = make_plan(Recipe.of(**recipe), tmp_path / "other").size_bytes
    in_bytes = f"{whole - 12_000}B"  # so that the embeddings are packed, as the program chooses
    budgets = ["3bpw", in_bytes]
    recipes = [recipe | {"budget": budget} for budget in budgets]
    out, registry = tmp_path / "Tiny", tmp_path / "registry"
    outcomes = compress(recipe, str(out), budgets, registry=str(registry))
    assert json.loads(json.dumps(outcomes)) == outcomes
    by_flow = [read_outcome(outcome) for outcome in outcomes]
    assert [str(done.version) for done in by_flow] == ["Tiny-3bpw:1", f"Tiny-{in_bytes}:1"]
    assert "costs" in [stage.name for stage in by_flow[0].stages]
    assert "embeddings" in [stage.name for stage in by_flow[0].stages]
    assert not {"costs", "embeddings"} & {stage.name for stage in by_flow[1].stages}
    assert [bool(done.plan.embeddings) for done in by_flow] == [False, True]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert out / "pareto.json" in before
    again = compress_budgets([Recipe.of(**settings) for settings in recipes], Registry(registry), out)
    assert again.was_finished
    assert [done.version for done in again.results] == [done.version for done in by_flow]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_every_budget_is_checked_by_the_first_step(recipe: dict[str, Any], tmp_path: Path) -> None:
    from flows import steps
    from pipeline.errors import BudgetError

    unweighted, budgets = recipe | {"sensitivity": "none"}, ["4.5bpw", "1bpw"]
    with pytest.raises(BudgetError, match=r"1 of the 2 budgets cannot be met.*1bpw"):
        steps.prepare.fn(
            unweighted, budgets, str(tmp_path / "registry"), str(tmp_path / "out"), "tiny", "cpu", "threads", True
        )
    assert not (tmp_path / "out").exists()
