import pytest

from pipeline.errors import BudgetError, RecipeChangedError, RecipeError
from pipeline.recipe import PRESETS, Recipe, refuse_changes
from quantizers import quantizer_from_label


def test_presets_settle_the_same_things() -> None:
    assert set(PRESETS) == {"fast", "default", "best"}
    for name, preset in PRESETS.items():
        assert set(preset) == set(PRESETS["default"])
        recipe = Recipe.of(name, model="demo", budget="3bpw")
        assert {key: recipe.to_json()[key] for key in preset} == preset


def test_presets_and_settings_on_top() -> None:
    fast = Recipe.of("fast", model="demo", budget="3bpw", seed=None)
    assert fast.num_samples == PRESETS["fast"]["num_samples"]
    assert Recipe.of("fast", model="demo", budget="3bpw", num_samples=5).num_samples == 5
    assert Recipe.from_json(fast.to_json()) == fast
    for label in fast.candidates:
        assert quantizer_from_label(label).format.label == label


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"colour": "red"}, r"1 wrong setting: colour: .*'red'"),
        ({"ranks": (-1,), "seed": "x"}, r"2 wrong settings: ranks\.0: .*; seed: "),
        ({"solver": "gurobi"}, "solver: .*'highs' or 'cbc'"),
        ({"candidates": ()}, "candidates: "),
        ({"sensitivity": "hessian"}, "sensitivity: "),
        ({"seq_len": 1}, "seq_len: "),
        ({"recover_train": ("codes",)}, "recover_train"),
        ({"recover_steps": 0, "recover_learning_rate": 0}, "recover_steps: .*; recover_learning_rate: "),
    ],
)
def test_every_wrong_setting_is_named(settings: dict, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        Recipe.of(model="demo", budget="3bpw", **settings)


def test_the_best_preset_recovers_and_has_known_candidates() -> None:
    best = Recipe.of("best", model="demo", budget="2.5bpw")
    assert best.recover
    assert {"trellis2-l12", "trellis3-l12", "trellis4-l12"} < set(best.candidates)
    assert all(quantizer_from_label(label).format.rank == 0 for label in best.candidates)
    assert not Recipe.of(model="demo", budget="3bpw").recover


def test_budget_and_preset_have_their_own_words() -> None:
    with pytest.raises(BudgetError):
        Recipe.of(model="demo", budget="3")
    with pytest.raises(RecipeError, match="no preset 'finest'; choose one of best, default, fast"):
        Recipe.of("finest", model="demo", budget="3bpw")


def test_changes_are_named() -> None:
    refuse_changes({"seed": 0}, {"seed": 0}, "The run", "Do this.")
    with pytest.raises(RecipeChangedError, match=r"ranks was \(8,\) and is now \(4,\); seed was 0 and is now 1\. Do"):
        refuse_changes({"ranks": (8,)}, {"ranks": (4,), "seed": 1}, "The run", "Do this.")
