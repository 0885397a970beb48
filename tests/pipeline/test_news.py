"""What is new: told by name, and only where other bytes would come out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.model import open_model
from pipeline.news import read_news
from pipeline.origin import without_local_folders
from pipeline.recipe import Recipe
from registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def _publish(registry: Registry, name: str, recipe: Recipe, **changes: Any) -> None:
    """A version that was made by the recipe, as far as recipe.json tells."""
    facts = without_local_folders(recipe.to_json() | {"model_commit": None})
    facts |= {"model_sha256": open_model(recipe.model).digest} | changes
    folder = registry.root.parent / f"made-{name}-{len(registry.versions())}"
    folder.mkdir()
    stored = {key: value for key, value in facts.items() if value != "left out"}
    (folder / "recipe.json").write_text(json.dumps(stored), encoding="utf-8")
    registry.publish(name, registry.add_artifact("checkpoint", folder))


def test_no_version_then_nothing_new_then_another_base(registry: Registry, tiny_model_dir: Path, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    recipe = Recipe.of(model=str(model), budget="3bpw")
    first = read_news(registry, [recipe], ["tiny"])
    assert first.changes == ("tiny has no version yet",)
    _publish(registry, "tiny", recipe)
    second = read_news(registry, [recipe], ["tiny"])
    assert (second.changes, second.key) == ((), first.key)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    third = read_news(registry, [recipe], ["tiny"])
    assert len(third.changes) == 1
    assert f"is {third.base[:12]} now" in third.changes[0]
    assert third.key != first.key


def test_a_changed_setting_is_named_with_both_values(registry: Registry, tiny_model_dir: Path) -> None:
    recipe = Recipe.of(model=str(tiny_model_dir), budget="3bpw", seed=1)
    _publish(registry, "tiny", recipe, seed=0)
    assert read_news(registry, [recipe], ["tiny"]).changes == ("the recipe of tiny:1 had seed 0, and it is 1 now",)


def test_a_setting_that_did_not_exist_then_counts_as_its_default(registry: Registry, tiny_model_dir: Path) -> None:
    recipe = Recipe.of(model=str(tiny_model_dir), budget="3bpw")
    _publish(registry, "tiny", recipe, share_groups="left out", overrides="left out")
    assert read_news(registry, [recipe], ["tiny"]).changes == ()


def test_each_budget_has_a_version_of_its_own_and_one_key(registry: Registry, tiny_model_dir: Path) -> None:
    recipes = [Recipe.of(model=str(tiny_model_dir), budget=budget) for budget in ("3bpw", "4bpw")]
    _publish(registry, "tiny-3bpw", recipes[0])
    news = read_news(registry, recipes, ["tiny-3bpw", "tiny-4bpw"])
    assert news.changes == ("tiny-4bpw has no version yet",)
    assert news.key == read_news(registry, recipes[:1], ["tiny-3bpw"]).key


def test_what_was_made_so_before_is_found_among_all_versions(registry: Registry, tiny_model_dir: Path) -> None:
    recipes = [Recipe.of(model=str(tiny_model_dir), budget="3bpw", seed=seed) for seed in range(3)]
    for recipe in recipes[:2]:
        _publish(registry, "tiny", recipe)
    assert [read_news(registry, [recipe], ["tiny"]).versions for recipe in recipes] == [("tiny:1",), ("tiny:2",), ()]
    old = registry.get(registry.version("tiny:1").digest)
    registry.path(old, "recipe.json").chmod(0o600)
    registry.path(old, "recipe.json").write_text("{", encoding="utf-8")
    changes = "the recipe of tiny:2 had seed 1, and it is 0 now"
    assert read_news(registry, recipes[:1], ["tiny"]).changes == (changes,)  # nobody can tell what the damaged one is
