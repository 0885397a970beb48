"""Recovery as a stage of the main job: same sizes, the measured gain in the written folder, kills, and no gain."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.compress import Compressed, compress
from pipeline.decompose import matrix_file, read_error
from pipeline.errors import CalibrationError, RecipeError
from pipeline.model import open_model
from pipeline.packed import load_packed
from pipeline.recipe import Recipe
from pipeline.recovered import KEPT_FILE
from pipeline.recovery_loss import mean_kl
from pipeline.run import Run
from pipeline.stages import StageLog
from pipeline.statistics import Statistics
from pipeline.teacher import teacher_windows
from quantizers import weighted_error
from registry import Registry
from tests.models import save_model
from tests.pipeline.small import SMALL, be_quick
from tests.pipeline.tiny_packed import original_llama

RECOVERED: dict[str, Any] = SMALL | {
    "budget": "3bpw",
    "factor_bits": (8,),
    "candidates": ("lloyd2-g32-s4", "trellis2", "lloyd2-g32-s4-r2-f8", "trellis3"),
    "ranks": (0,),
    "num_samples": 8,
    "eval_windows": 0,
    "recover": True,
    "recover_samples": 8,
    "recover_steps": 6,
    "recover_learning_rate": 3e-3,
}
# Every kind of stored tensor is there: a block format with factors of 8 bits, one without, and trellises.
FIXED = (
    ("down_proj", "lloyd2-g32-s4-r2-f8"),
    ("gate_proj", "lloyd2-g32-s4"),
    ("up_proj", "trellis2-r2"),
    ("o_proj", "vtrellis2.5"),
)


def run(model: Path, place: Path, registry: Path | None = None, **changes: Any) -> Compressed:
    """Into `place`/out, with what `registry` has already, if one is given."""
    recipe = Recipe.of(model=str(model), **(RECOVERED | {"overrides": FIXED} | changes))
    return compress(recipe, Registry(registry or place / "registry"), place / "out")


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def loud_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """Its predictions depend on its weights, so that there is something to recover."""
    return save_model(original_llama().to(torch.bfloat16), tmp_path_factory.mktemp("loud"), tokenizer=tiny_tokenizer)


@pytest.fixture(scope="module")
def finished(loud_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Compressed]:
    place = tmp_path_factory.mktemp("recovered")
    return place, run(loud_model_dir, place)


@pytest.fixture(scope="module")
def registry(finished) -> Path:
    """It has the statistics, the cost table and the original's answers."""
    return finished[0] / "registry"


@pytest.fixture(scope="module")
def plain(loud_model_dir: Path, registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights without recovery."""
    return run(loud_model_dir, tmp_path_factory.mktemp("plain"), registry, recover=False).folder / "model.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_it_is_a_stage_that_gains_and_changes_no_size(finished, plain: Path) -> None:
    _, done = finished
    assert done.recovery is not None
    assert done.recovery.has_gained
    assert done.recovery.best_kl < done.recovery.start_kl
    names = [stage.name for stage in done.stages]
    assert names[names.index("decompose") + 1] == "recover"
    assert (done.folder / "model.safetensors").stat().st_size == plain.stat().st_size


def test_scales_factors_and_norms_change_and_nothing_else(finished, plain: Path) -> None:
    before, after = load_file(plain), load_file(finished[1].folder / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    layer = "model.layers.0.mlp"
    assert f"{layer}.up_proj.weight_scale" in changed
    assert "model.layers.0.self_attn.o_proj.weight_scale" in changed
    assert not any(name.endswith(("_rates", "_ahead")) for name in changed)
    assert f"{layer}.gate_proj.weight_scale_step" in changed
    assert f"{layer}.down_proj.low_rank_out_packed" in changed
    assert f"{layer}.up_proj.low_rank_in" in changed
    assert any("norm" in name for name in changed)
    assert not any(name.endswith((".weight_packed", ".weight_scale_packed", "embed_tokens.weight")) for name in changed)
    assert all(before[name].dtype == after[name].dtype for name in changed)


def test_the_folder_has_the_divergence_that_was_measured(finished, loud_model_dir: Path, tmp_path: Path) -> None:
    _, done = finished
    recipe = Recipe.of(model=str(loud_model_dir), **(RECOVERED | {"overrides": FIXED}))
    opened = Run.open(
        recipe, Registry(tmp_path / "registry"), device="cpu", resume=True, log=StageLog(), progress=_Silent()
    )
    tokens = opened.texts.recovery.tokens
    teacher = teacher_windows(opened.model.load, tokens, tmp_path, num_top=64, with_hidden=False)
    window = teacher.window(len(tokens) - 1, torch.device("cpu"))
    with torch.no_grad():
        logits = load_packed(done.folder)(tokens[-1:]).logits[0, :-1]
    assert mean_kl(logits, window).item() == pytest.approx(
        done.recovery.best_kl, rel=5e-3
    )  # bfloat16, where the CPU has it


class _Silent:
    def say(self, message: str) -> None: ...


def test_the_errors_of_changed_matrices_are_measured_anew(finished, loud_model_dir: Path) -> None:
    place, done = finished
    registry = Registry(place / "registry")
    made = {artifact.kind: artifact for artifact in registry.lineage(done.version.digest).artifacts}
    assert KEPT_FILE in made["recovered"].files
    statistics = Statistics.open(lambda name: registry.path(made["statistics"], name))
    model, network = open_model(str(loud_model_dir)), load_packed(done.folder)
    for matrix in model.matrices[:7]:
        quantized = network.get_submodule(matrix.module).quantized()
        error = weighted_error(model.weight(matrix) - quantized.dequantize(), statistics.of(matrix))
        stored = read_error(registry.path(made["recovered"], matrix_file(matrix.module)))
        assert stored == pytest.approx(error, rel=1e-3)


def test_report_and_result_tell_of_it(finished) -> None:
    _, done = finished
    told = done.to_json()["recovery"]
    assert told["meaning"].startswith("KL divergence")
    assert told["steps"] == 6
    assert json.loads((done.folder / "report" / "report.json").read_text())["recovery"]["best_kl"] == told["best_kl"]
    assert "<h2>Recovery</h2>" in (done.folder / "report" / "index.html").read_text()
    assert "--recover-steps 6" in (done.folder / "report" / "index.html").read_text()


def test_a_second_run_finds_it_done(finished, loud_model_dir: Path) -> None:
    place, first = finished
    again = run(loud_model_dir, place)
    assert again.was_finished
    assert again.recovery == first.recovery
    assert next(stage for stage in again.stages if stage.name == "recover").reused


def test_without_a_gain_the_checkpoint_is_the_one_before(
    loud_model_dir: Path, registry: Path, plain: Path, tmp_path: Path
) -> None:
    done = run(loud_model_dir, tmp_path, registry, recover_learning_rate=100.0, recover_steps=2)
    assert done.recovery is not None
    assert not done.recovery.has_gained
    assert done.recovery.best_kl == done.recovery.start_kl
    assert (done.folder / "model.safetensors").read_bytes() == plain.read_bytes()
    assert "checkpoint is the one without recovery" in (done.folder / "report" / "index.html").read_text()


def test_an_unweighted_error_still_has_a_text_to_train_on(loud_model_dir: Path, tmp_path: Path) -> None:
    done = run(loud_model_dir, tmp_path, sensitivity="none", recover_train=("scales",))
    assert done.recovery is not None
    assert done.recovery.has_gained
    assert done.recovery.num_train_windows + done.recovery.num_held_out_windows == 8


def test_another_budget_asks_the_original_nothing_new(
    loud_model_dir: Path, registry: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("pipeline.teacher._ask", None)
    done = run(loud_model_dir, tmp_path, registry, budget="4bpw", recover_steps=1, overrides=())
    assert done.recovery is not None


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"dataset": "one_window.txt"}, CalibrationError, "one is held out"),
        ({"recover_kl_weight": 0.0}, RecipeError, "nothing to train for"),
        ({"recover_train": ("factors",), "overrides": ()}, RecipeError, "rank 0 there are none"),
    ],
)
def test_what_cannot_work_is_refused_before_the_work(
    changes: dict, error: type[Exception], expected: str, loud_model_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one_window.txt").write_text("a " * 40 + "\n")  # more than 32 tokens, fewer than 64
    with pytest.raises(error, match=expected):
        run(loud_model_dir, tmp_path, **changes)
    assert not (tmp_path / "out.partial").exists()


KILL_POINTS = {
    "the original's answers": ("pipeline.teacher", "_ask", 3),
    "training": ("pipeline.recover", "mean_kl", 8),
    "writing": ("pipeline.recovered", "write_matrix", 4),
}


def _child(model: str, place: str, kill_point: str) -> None:
    import importlib

    torch.set_num_threads(1)
    be_quick()
    module, name, at = KILL_POINTS[kill_point]
    owner, calls = importlib.import_module(module), []
    real = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, counting)
    run(Path(model), Path(place))


def test_a_run_that_is_killed_thrice_ends_in_the_same_bytes(finished, loud_model_dir: Path, tmp_path: Path) -> None:
    """Each run goes on from where the one before was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.compress", "tests.pipeline.test_compress_recovered"])
    for kill_point in KILL_POINTS:
        child = context.Process(target=_child, args=(str(loud_model_dir), str(tmp_path), kill_point))
        child.start()
        child.join(240)
        assert child.exitcode == -signal.SIGKILL, kill_point
    assert run(loud_model_dir, tmp_path).recovery == finished[1].recovery
    assert contents(tmp_path / "out") == contents(finished[0] / "out")
