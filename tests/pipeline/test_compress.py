"""The main job on tiny models: whole runs, and what a second run does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.compress import Compressed, compress
from pipeline.errors import (
    BudgetError,
    CheckpointError,
    DiskSpaceError,
    NonFiniteError,
    OutputExistsError,
    RecipeChangedError,
    RecipeError,
)
from pipeline.output import OutputFolder, base_of
from pipeline.packed import load_packed
from pipeline.recipe import Recipe
from registry import Registry
from tests.models import build_llama, save_model
from tests.pipeline.small import SMALL


def small_recipe(model: Path, **changes: Any) -> Recipe:
    return Recipe.of(model=str(model), **(SMALL | changes))


def run(model: Path, place: Path, **changes: Any) -> Compressed:
    resume = changes.pop("resume", True)
    return compress(small_recipe(model, **changes), Registry(place / "registry"), place / "out", resume=resume)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Compressed]:
    place = tmp_path_factory.mktemp("finished")
    return place, run(tiny_model_dir, place)


@pytest.fixture
def copy(finished, tmp_path: Path) -> Path:
    """Registry and folder of the finished run, to be damaged."""
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))


def test_the_budget_holds_and_the_folder_is_complete(finished, tiny_model_dir: Path) -> None:
    place, done = finished
    assert done.plan.bits_per_param <= 4.5
    assert str(done.version) == "out:1"
    assert done.evaluation is not None
    assert done.evaluation.kl_divergence.mean > 0
    files = {path.name for path in (place / "out").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "plan.json",
        "recipe.json",
        "tokenizer.json",
        "report",
    } <= files
    assert done.size_bytes == sum(len(data) for name, data in contents(place / "out").items() if "report/" not in name)
    assert not (place / "out.partial").exists()
    assert done.stages[0].name == "open"


def test_it_loads_packed_and_its_logits_are_those_of_the_plan(finished, tiny_model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    from quantizers import QuantizedLinear

    place, done = finished
    network = AutoModelForCausalLM.from_pretrained(place / "out", dtype=torch.float32)
    packed = {name for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    assert packed == set(done.plan.matrices)
    stored_bits = sum(network.get_submodule(name).quantized().size_bits for name in packed)
    assert stored_bits == done.plan.size_bits
    tokens = torch.arange(5, 25)[None]
    packed_logits = network(tokens).logits
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for name in packed:
        dense.get_submodule(name).weight.data.copy_(network.get_submodule(name).quantized().dequantize())
    torch.testing.assert_close(packed_logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)
    generated = network.generate(tokens, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > 20


@pytest.mark.parametrize("folder", ["odd_model_dir", "tiny_gpt2_dir"])
def test_odd_shapes_and_conv1d(folder: str, request, tmp_path: Path) -> None:
    done = run(request.getfixturevalue(folder), tmp_path, ranks=(0,))
    assert done.plan.bits_per_param <= 4.5
    assert done.evaluation.top1_agreement.mean > 0.5


def test_byte_budgets_hold_for_the_whole_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    smallest = run(tiny_model_dir, tmp_path / "a", budget="2.6bpw", eval_windows=0).size_bytes
    limit = smallest + 4000
    done = run(tiny_model_dir, tmp_path / "b", budget=f"{limit}B", eval_windows=0)
    assert limit - 2000 < done.size_bytes <= limit
    assert done.evaluation is None


def test_overrides_groups_and_no_calibration(tiny_model_dir: Path, tmp_path: Path) -> None:
    done = run(
        tiny_model_dir,
        tmp_path,
        overrides=(("down_proj", "nf4"),),
        share_groups=True,
        sensitivity="none",
        eval_windows=0,
    )
    labels = {name: matrix.label for name, matrix in done.plan.matrices.items()}
    assert {label for name, label in labels.items() if "down_proj" in name} == {"nf4-g64-s8"}
    for layer in range(2):
        attention = {labels[f"model.layers.{layer}.self_attn.{kind}_proj"] for kind in "qkv"}
        assert len(attention) == 1


def test_a_second_run_finds_everything_done(finished, tiny_model_dir: Path) -> None:
    place, first = finished
    before = {
        path: path.stat().st_mtime_ns
        for path in (place / "out").rglob("*")
        if path.is_file() and "report" not in path.parts
    }
    again = run(tiny_model_dir, place)
    assert again.was_finished
    assert again.version == first.version
    assert all(stage.reused for stage in again.stages if stage.name in ("statistics", "costs", "decompose", "evaluate"))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())


def test_the_same_recipe_gives_the_same_bytes(finished, tiny_model_dir: Path, tmp_path: Path) -> None:
    place, first = finished
    again = run(tiny_model_dir, tmp_path)
    assert again.version.digest == first.version.digest
    assert contents(tmp_path / "out") == contents(place / "out")


def test_a_forecast_is_exact_to_the_byte_and_a_dry_run_writes_nothing(
    finished, tiny_model_dir: Path, tmp_path: Path
) -> None:
    from pipeline.planning import make_plan

    _, done = finished
    planned = make_plan(small_recipe(tiny_model_dir), tmp_path / "registry", dry_run=True)
    assert planned.size_bytes == done.size_bytes
    assert planned.plan == done.plan
    assert not (tmp_path / "registry").exists()


def test_other_recipes_are_refused_by_the_name_of_the_field(finished, tiny_model_dir: Path) -> None:
    place, _ = finished
    with pytest.raises(RecipeChangedError, match=r"seed was 0 and is now 1"):
        run(tiny_model_dir, place, seed=1)
    with pytest.raises(OutputExistsError, match="--no-resume would make it again"):
        run(tiny_model_dir, place, resume=False)


def test_a_changed_file_in_a_finished_folder_is_noticed(copy: Path, tiny_model_dir: Path) -> None:
    (copy / "out" / "plan.json").write_text("{}")
    with pytest.raises(OutputExistsError, match=r"plan\.json is missing or was changed"):
        run(tiny_model_dir, copy)


def test_a_second_run_mends_a_damaged_copy_in_the_registry(copy: Path, tiny_model_dir: Path) -> None:
    registry = Registry(copy / "registry")
    blob = registry.path(registry.get(registry.version("out").digest), "plan.json")
    blob.chmod(0o644)
    blob.write_text("{}")
    assert not registry.verify("out").ok
    assert str(run(tiny_model_dir, copy).version) == "out:1"
    assert registry.verify("out").ok


def test_a_file_in_the_way_is_called_a_file(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(OutputExistsError, match="is a file"):
        run(tiny_model_dir, tmp_path)


@pytest.mark.parametrize("content", ["", '{"model', "[]"])
def test_a_damaged_recipe_is_one_paragraph(content: str, copy: Path, tiny_model_dir: Path) -> None:
    (copy / "out" / "recipe.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"recipe\.json cannot be read"):
        run(tiny_model_dir, copy)
    with pytest.raises(CheckpointError, match=r"recipe\.json cannot be read"):
        base_of(copy / "out")
    (copy / "new.partial").mkdir()
    (copy / "new.partial" / "recipe.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"recipe\.json cannot be read"):
        OutputFolder(copy / "new", {}).claim(resume=True)
    OutputFolder(copy / "new", {}).claim(resume=False)
    assert json.loads((copy / "new.partial" / "recipe.json").read_text()) == {}


def test_a_truncated_checkpoint_does_not_load(copy: Path) -> None:
    weights = copy / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*damaged"):
        load_packed(copy / "out")


def test_the_byte_budget_that_an_error_advises_is_enough(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="Raise the budget to") as error:
        run(tiny_model_dir, tmp_path, budget="10kB", eval_windows=0)
    advised = str(error.value).split("Raise the budget to ")[1].split(",")[0]
    assert run(tiny_model_dir, tmp_path, budget=advised, eval_windows=0).folder.is_dir()


def test_the_forecast_stands_beside_what_was_measured(finished) -> None:
    for stage in finished[1].to_json()["stages"]:
        assert (stage["name"] == "open") == (stage["forecast_memory_bytes"] is None)
        if stage["forecast_memory_bytes"]:
            assert stage["forecast_seconds"] > 0
            assert 0.4 < stage["forecast_memory_bytes"] / stage["peak_memory_bytes"] < 2.5


def test_an_unpacked_network_answers_alike(finished) -> None:
    from pipeline.packed import load_packed, unpack
    from quantizers import QuantizedLinear

    network = load_packed(finished[1].folder)
    tokens = torch.arange(20)[None]
    packed = network(tokens).logits
    unpack(network)
    assert not any(isinstance(module, QuantizedLinear) for module in network.modules())
    torch.testing.assert_close(network(tokens).logits, packed, rtol=1e-4, atol=1e-5)


def test_a_foreign_folder_is_never_touched(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for resume in (True, False):
        with pytest.raises(OutputExistsError, match="not empty and was not made by bitsmith"):
            run(tiny_model_dir, tmp_path, resume=resume)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    assert not (tmp_path / "registry" / "steps").exists()


def test_a_full_disk_is_noticed_before_the_work(tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(DiskSpaceError, match=r"writes up to .* has 1\.00 kB free"):
        run(tiny_model_dir, tmp_path)
    assert not (tmp_path / "out.partial").exists()


def test_a_rank_above_a_matrix_is_noticed_before_the_work(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Rank 65 is above"):
        run(tiny_model_dir, tmp_path, ranks=(65,))


def test_nan_weights_name_the_tensor(tiny_tokenizer, tmp_path: Path) -> None:
    model = build_llama()
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 4] = torch.nan
    (tmp_path / "model").mkdir()
    folder = save_model(model, tmp_path / "model", tokenizer=tiny_tokenizer)
    for sensitivity in ("none", "fisher"):
        with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj"):
            run(folder, tmp_path, sensitivity=sensitivity, eval_windows=0)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_samples_that_would_take_too_long_are_left_out(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the original is streamed, as it takes too much memory; the figures are the same."""
    found = []
    for place in ("before", "limited"):
        monkeypatch.setenv("BITSMITH_HOME", str(tmp_path / place / "home"))
        (tmp_path / place).mkdir()
        run(tiny_model_dir, tmp_path / place)
        found.append(json.loads((tmp_path / place / "out" / "report" / "report.json").read_text())["evaluation"])
        monkeypatch.setattr("pipeline.unloaded.WHOLE_SHARE", 0)
    assert found[0]["report"] == found[1]["report"]
    assert all(found[0]["samples"].values())
    assert not any(found[1]["samples"].values())


def test_the_number_of_threads_changes_no_byte(tmp_path: Path) -> None:
    """Wide enough that torch shares its products out."""
    network = build_llama(hidden_size=256, intermediate_size=384, num_layers=1)
    model, digests, num_threads = save_model(network, tmp_path / "model"), [], torch.get_num_threads()
    candidates = {"candidates": ("lloyd2-g32-s4", "lloyd3-g32-s4"), "sensitivity": "kronecker", "budget": "3bpw"}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            place = tmp_path / str(threads)
            done = run(model, place, num_samples=8, seq_len=128, eval_windows=0, **candidates)
            digests.append((done.version.digest, contents(done.folder)["plan.json"]))
    finally:
        torch.set_num_threads(num_threads)
    assert digests[0] == digests[1]


def without_tensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_packing(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def without_a_matrix(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["matrices"]["model.layers.0.mlp.up_proj"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without_tensors, r"has missing keys: .*model\.embed_tokens\.weight"),
        (without_packing, "does not say how the weights are packed"),
        (without_a_matrix, r"has (missing|unexpected) keys: .*up_proj"),
    ],
)
def test_a_checkpoint_that_lacks_something_does_not_load(damage, said: str, copy: Path) -> None:
    damage(copy / "out")
    with pytest.raises(CheckpointError, match=said):
        load_packed(copy / "out")


def test_a_config_without_a_dtype_gets_the_original_s(tiny_model_dir: Path, tmp_path: Path) -> None:
    """transformers takes the first tensor's where there is none, which may be one of ours."""
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        config.pop(name, None)
    (model / "config.json").write_text(json.dumps(config))
    done = run(model, tmp_path)
    assert json.loads((done.folder / "config.json").read_text())["dtype"] == "bfloat16"
