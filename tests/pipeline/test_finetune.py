"""Finetuning a tiny compressed model: the adapter, kills, bad losses, and the merged model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline import adapter as adapter_module
from pipeline import charts, finetune_report, training_state
from pipeline import finetune as finetune_module
from pipeline.adapter import load_tuned
from pipeline.compress import compress
from pipeline.errors import (
    CalibrationError,
    CheckpointError,
    DiskSpaceError,
    NonFiniteError,
    OutputExistsError,
    RecipeChangedError,
    RecipeError,
)
from pipeline.finetune import Answers, Finetuned, finetune
from pipeline.finetune_settings import FinetuneSettings
from pipeline.lora_network import Opened, open_for_finetuning
from pipeline.merged import write_merged
from pipeline.packed import load_packed, unpack
from pipeline.recipe import Recipe
from pipeline.training import Training
from quantizers import QuantizedLinear
from registry import Registry
from tests.architectures import build_causal
from tests.models import build_gpt2, build_llama, build_tokenizer, save_model
from tests.pipeline.small import SMALL, be_quick

ROOT = Path(__file__).parents[2]
ROWS = [
    {"prompt": f"what is the {word}", "completion": f"the {word} is old"}
    for word in ("river", "town", "house", "road", "field", "church", "mill", "wall", "gate", "hill")
]
SETTINGS = FinetuneSettings(
    steps=6, rank=3, batch_size=2, seq_len=64, check_every=2, learning_rate=1e-2, compute="float32"
)
QUICK: dict[str, Any] = {"eval_windows": 0, "sensitivity": "none", "cost_rows": None}


def checkpoint_of(network, folder: Path, **changes: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        be_quick(patch.setattr)
        model = save_model(network, folder / "model", tokenizer=build_tokenizer())
        recipe = Recipe.of(model=str(model), **(SMALL | QUICK | changes))
        return compress(recipe, Registry(folder / "registry"), folder / "packed").folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of its layers have factors, some have none."""
    folder = checkpoint_of(
        build_llama(),
        tmp_path_factory.mktemp("base"),
        overrides=(("q_proj|up_proj", "lloyd2-g32-s4-r2"), ("[kvo]_proj|gate_proj|down_proj", "lloyd2-g32-s4")),
    )
    packed = [layer.format.rank for layer in load_packed(folder).modules() if isinstance(layer, QuantizedLinear)]
    assert set(packed) == {0, 2}
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return str(path)


@pytest.fixture(autouse=True)
def _plain_pictures(monkeypatch) -> None:
    monkeypatch.setattr(finetune_report, "png", lambda draw, content, theme: b"a picture")


def run(checkpoint: Path, dataset: str, out: Path, settings: FinetuneSettings = SETTINGS, **options) -> Finetuned:
    return finetune(checkpoint, dataset, settings, out, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(checkpoint: Path, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Finetuned:
    out = tmp_path_factory.mktemp("adapter") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_report, "png", lambda draw, content, theme: b"a picture")
        return run(checkpoint, dataset, out)


@pytest.mark.parametrize("start", ["zero", "factors"])
def test_the_answers_become_likelier_and_the_adapter_says_so_when_loaded(
    start: str, checkpoint: Path, dataset: str, tmp_path: Path
) -> None:
    done = run(checkpoint, dataset, tmp_path / "out", SETTINGS.model_copy(update={"start": start, "steps": 12}))
    assert done.report.has_gained
    assert done.report.kept_loss < done.report.start_loss
    assert len(done.report.losses) == 12
    assert [step for step, _ in done.report.checks] == [0, 2, 4, 6, 8, 10, 12]
    tuned = load_tuned(checkpoint, done.folder)
    lesson = Answers(tuned, read_all(checkpoint, dataset), SETTINGS)
    with torch.no_grad():
        assert lesson.held_out_loss(range(9, 10)) == pytest.approx(done.report.kept_loss, rel=1e-4)


def read_all(checkpoint: Path, dataset: str):
    from transformers import AutoTokenizer

    from pipeline.conversations import read_examples
    from pipeline.progress import SILENT

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return read_examples(dataset, tokenizer, seq_len=64, most_rows=100, revision=None, progress=SILENT)


@pytest.mark.parametrize("start", ["zero", "factors"])
def test_before_the_first_step_the_network_says_what_the_checkpoint_says(start: str, checkpoint: Path) -> None:
    tokens = torch.arange(20)[None]
    expected = load_packed(checkpoint)(input_ids=tokens).logits
    opened = open_for_finetuning(load_packed(checkpoint), SETTINGS.model_copy(update={"start": start}))
    assert torch.allclose(opened.network(input_ids=tokens).logits, expected, atol=1e-5)
    assert bool(opened.replaced) == (start == "factors")
    trained = {parameter for parameter in opened.network.parameters() if parameter.requires_grad}
    assert trained == set(opened.live.values())


def test_factors_start_from_the_checkpoint_s_own_and_are_stored_as_an_addition_to_it(checkpoint: Path) -> None:
    opened = open_for_finetuning(load_packed(checkpoint), SETTINGS)
    stored = opened.adapter({name: parameter.detach() for name, parameter in opened.live.items()})
    for module, own in opened.replaced.items():
        assert opened.stored_ranks[module] == 2 * own.out.shape[1]
        into, out = (stored[f"base_model.model.{module}.lora_{kind}.weight"] for kind in "AB")
        assert torch.allclose(out @ into, torch.zeros(1), atol=1e-6), "nothing was trained, so nothing is added"
        assert torch.equal(into[: own.into.shape[0]], own.into)


def test_the_same_settings_give_the_same_bytes(finished: Finetuned, checkpoint: Path, dataset: str, tmp_path) -> None:
    run(checkpoint, dataset, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(finished.folder)
    run(checkpoint, dataset, tmp_path / "other", SETTINGS.model_copy(update={"seed": 1}))
    assert (
        contents(tmp_path / "other")["adapter_model.safetensors"]
        != contents(finished.folder)["adapter_model.safetensors"]
    )


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    finished: Finetuned, checkpoint: Path, dataset: str, tmp_path: Path, monkeypatch
) -> None:
    steps: list[int] = []
    move = Training._move

    def killed(self: Training, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt
        move(self, step)

    monkeypatch.setattr(training_state, "SAVE_SHARE", 1e9)  # save after every step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_move", killed)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Training, "_move", lambda self, step: (steps.append(step), move(self, step)))
    run(checkpoint, dataset, tmp_path / "out")
    assert steps == [3, 4, 5]
    assert contents(tmp_path / "out") == contents(finished.folder)
    assert not (tmp_path / "out.partial").exists()


def test_a_finished_run_is_not_done_again(finished: Finetuned, checkpoint: Path, dataset: str, monkeypatch) -> None:
    monkeypatch.setattr(Training, "run", None)
    again = run(checkpoint, dataset, finished.folder)
    assert again.was_finished
    assert again.report == finished.report


def test_another_setting_in_the_same_place_is_refused_by_name(finished, checkpoint: Path, dataset: str) -> None:
    with pytest.raises(RecipeChangedError, match="learning_rate"):
        run(checkpoint, dataset, finished.folder, SETTINGS.model_copy(update={"learning_rate": 1e-4}))


def test_a_folder_of_something_else_is_left_alone(checkpoint: Path, dataset: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not made by bitsmith"):
        run(checkpoint, dataset, tmp_path)


def test_a_loss_that_becomes_nan_stops_and_the_last_good_adapter_is_kept(
    checkpoint: Path, dataset: str, tmp_path: Path, monkeypatch
) -> None:
    losses = finetune_module.Answers.losses
    steps: list[list[int]] = []

    def broken(self, indices: list[int]):
        steps.append(indices)
        for some, loss in losses(self, indices):
            yield some, loss * (torch.nan if len(steps) > 4 else 1)

    monkeypatch.setattr(finetune_module.Answers, "losses", broken)
    with pytest.raises(NonFiniteError, match=r"is nan at step 4 of the finetuning.*a tenth.* The adapter of step 4, "):
        run(checkpoint, dataset, tmp_path / "out")
    with pytest.raises(NonFiniteError, match=r"The adapter of step 4, .*another folder with -o"):
        run(checkpoint, dataset, tmp_path / "out")
    load_tuned(checkpoint, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert report["kept_step"] == 4
    assert "nan" in report["stopped_by"]


def test_a_loss_that_becomes_nan_before_the_first_measurement_keeps_the_step_before(
    checkpoint: Path, dataset: str, tmp_path: Path, monkeypatch
) -> None:
    losses = Answers.losses
    steps: list[list[int]] = []

    def broken(self, indices: list[int]):
        steps.append(indices)
        for some, loss in losses(self, indices):
            yield some, loss * (torch.nan if len(steps) > 3 else 1)

    monkeypatch.setattr(Answers, "losses", broken)
    with pytest.raises(NonFiniteError, match=r"is nan at step 3 .* The adapter of step 3, "):
        run(checkpoint, dataset, tmp_path / "out", SETTINGS.model_copy(update={"check_every": 5}))
    load_tuned(checkpoint, tmp_path / "out")


def test_a_loss_that_becomes_nan_after_no_gain_keeps_the_last_adapter(
    checkpoint: Path, dataset: str, tmp_path: Path, monkeypatch
) -> None:
    losses = Answers.losses
    steps: list[list[int]] = []

    def broken(self, indices: list[int]):
        steps.append(indices)
        for some, loss in losses(self, indices):
            yield some, loss * (torch.nan if len(steps) > 3 else 1)

    monkeypatch.setattr(Answers, "losses", broken)
    told = r"is nan at step 3 .* The adapter of step 3, the last before that and no better than the start, is in"
    with pytest.raises(NonFiniteError, match=told):
        run(checkpoint, dataset, tmp_path / "out", SETTINGS.model_copy(update={"learning_rate": 1e-30}))
    load_tuned(checkpoint, tmp_path / "out")


def test_peft_itself_reads_the_factors_right(checkpoint: Path, finished: Finetuned) -> None:
    """On the base in a dense form, where nothing of this package is asked."""
    dense = load_packed(checkpoint)
    unpack(dense)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = load_tuned(checkpoint, finished.folder)(input_ids=tokens).logits
        found = PeftModel.from_pretrained(dense, str(finished.folder)).eval()(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_loss_that_is_nan_at_once_leaves_nothing(checkpoint: Path, dataset: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(finetune_module.Answers, "losses", lambda *_: iter([([0, 1], torch.tensor(torch.nan))]))
    with pytest.raises(NonFiniteError, match="No adapter was written"):
        run(checkpoint, dataset, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_a_gain_the_last_values_are_kept_and_it_is_said(checkpoint: Path, dataset: str, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"learning_rate": 1e-30})
    report = run(checkpoint, dataset, tmp_path / "out", settings).report
    assert not report.has_gained
    assert report.kept_step == 6
    assert "no gain" in report.meaning
    assert "<strong>No gain:</strong>" in (tmp_path / "out" / "report" / "index.html").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_passes_its_audit(
    dtype, checkpoint: Path, dataset: str, tmp_path, monkeypatch
) -> None:
    """As on a GPU, where the checkpoint's own dtype is loaded; float16 is trained in float32."""
    load = finetune_module.load_packed
    for module, stored in ((finetune_module, dtype), (adapter_module, torch.bfloat16)):

        def loaded(folder: Path, device: str, dtype=None, *, stored: torch.dtype = stored, **trust: bool):
            return load(folder, device, dtype or stored, **trust)

        monkeypatch.setattr(module, "load_packed", loaded)
    settings = SETTINGS.model_copy(update={"compute": "bfloat16", "start": "factors"})
    assert run(checkpoint, dataset, tmp_path / "out", settings).report.has_gained


def test_a_full_disk_is_one_paragraph(checkpoint: Path, dataset: str, tmp_path: Path, monkeypatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_state, "save_file", full)
        with pytest.raises(DiskSpaceError, match="run the same command"):
            run(checkpoint, dataset, tmp_path / "out")
    assert run(checkpoint, dataset, tmp_path / "out").report.steps == 6


def test_another_process_writes_the_same_bytes(finished: Finetuned, checkpoint: Path, dataset: str, tmp_path) -> None:
    """Names are hashed anew in every process, and PEFT keeps those of modules in a set."""
    script = (
        "import sys; from pathlib import Path; from pipeline import finetune_report; from pipeline.finetune import *\n"
        "finetune_report.png = lambda draw, content, theme: b'a picture'\n"
        "settings = FinetuneSettings.model_validate_json(sys.argv[4])\n"
        "finetune(Path(sys.argv[1]), sys.argv[2], settings, Path(sys.argv[3]))\n"
    )
    command = [sys.executable, "-c", script, checkpoint, dataset, tmp_path / "out", SETTINGS.model_dump_json()]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert contents(tmp_path / "out") == contents(finished.folder)


def test_a_batch_is_the_mean_over_the_answers_of_examples_of_any_length(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "say", "completion": "the river " * number} for number in (1, 9, 4)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    network, examples = load_packed(checkpoint), read_all(checkpoint, str(tmp_path / "rows.jsonl"))
    lesson = Answers(network, examples, SETTINGS)
    total, num_tokens = 0.0, 0
    for index, item in enumerate(examples.items):
        ((_, alone),) = lesson.losses([index])
        total, num_tokens = total + alone.item() * int(item.is_answer.sum()), num_tokens + int(item.is_answer.sum())
    ((which, together),) = lesson.losses([0, 1, 2])
    assert which == [0, 1, 2]
    assert together.item() == pytest.approx(total / num_tokens, rel=1e-5)
    with torch.no_grad():
        assert lesson.held_out_loss(range(3)) == pytest.approx(together.item(), rel=1e-5)


def test_gradients_do_not_depend_on_whether_activations_are_kept(checkpoint: Path, dataset: str) -> None:
    opened = open_for_finetuning(load_packed(checkpoint), SETTINGS, keep_activations=True)
    ((_, loss),) = Answers(opened.network, read_all(checkpoint, dataset), SETTINGS).losses([0, 1])
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in opened.live.items()}
    assert all(gradient is not None for gradient in gradients.values())
    other = open_for_finetuning(load_packed(checkpoint), SETTINGS, keep_activations=False)
    ((_, loss),) = Answers(other.network, read_all(checkpoint, dataset), SETTINGS).losses([0, 1])
    loss.backward()
    for name, parameter in other.live.items():
        assert torch.equal(parameter.grad, gradients[name])


def test_where_memory_runs_out_activations_are_computed_again(
    finished: Finetuned, checkpoint: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted, failures = Answers._predicted, []

    def short(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in self.network.modules())
        if torch.is_grad_enabled() and not recomputes:
            failures.append(indices)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predicted(self, indices)

    monkeypatch.setattr(Answers, "_predicted", short)
    assert run(checkpoint, dataset, tmp_path / "out").report == finished.report
    assert len(failures) == 1


def test_rank_zero_without_factors_has_nothing_to_train(checkpoint: Path, dataset: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Nothing would be trained: the rank is 0"):
        run(checkpoint, dataset, tmp_path / "out", SETTINGS.model_copy(update={"rank": 0, "start": "zero"}))
    assert list(tmp_path.iterdir()) == []
    assert open_for_finetuning(load_packed(checkpoint), FinetuneSettings(rank=0)).replaced


def test_an_encoder_is_refused(tmp_path: Path, dataset: str) -> None:
    folder = checkpoint_of(build_causal("bert"), tmp_path)
    with pytest.raises(CheckpointError, match="no decoder"):
        run(folder, dataset, tmp_path / "out")


def test_an_example_longer_than_the_positions_is_refused_before_the_work(tmp_path: Path) -> None:
    folder = checkpoint_of(build_gpt2(), tmp_path)
    positions = json.loads((folder / "config.json").read_text())["n_positions"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "the river " * 2 * positions}) + "\n")
    with pytest.raises(CalibrationError, match=rf"longer than the {positions} positions .* --seq-len {positions}"):
        run(folder, str(rows), tmp_path / "out", SETTINGS.model_copy(update={"seq_len": positions + 1}))
    assert not (tmp_path / "out.partial").exists()


def test_a_damaged_adapter_does_not_get_its_name(checkpoint: Path, dataset: str, tmp_path: Path, monkeypatch) -> None:
    honest = Opened.adapter
    monkeypatch.setattr(
        Opened,
        "adapter",
        lambda self, values: {name: tensor * 1.5 + 0.1 for name, tensor in honest(self, values).items()},
    )
    with pytest.raises(CheckpointError, match="differ by"):
        run(checkpoint, dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_adapter_of_another_checkpoint_is_refused(finished: Finetuned, checkpoint: Path, tmp_path: Path) -> None:
    other = checkpoint_of(build_llama(), tmp_path, budget="3bpw")
    with pytest.raises(CheckpointError, match=r"does not go on .*any other base"):
        load_tuned(other, finished.folder)


def test_a_truncated_adapter_is_refused(finished: Finetuned, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "copy")
    weights = tmp_path / "copy" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="does not go on"):
        load_tuned(checkpoint, tmp_path / "copy")


def test_an_adapter_that_lacks_a_tensor_is_refused(finished: Finetuned, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "copy")
    weights = tmp_path / "copy" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match="damaged or was changed"):
        load_tuned(checkpoint, tmp_path / "copy")


def build_untied() -> PreTrainedModel:
    return build_llama(tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("build", "embeddings"),
    [(build_llama, "lloyd6-g32-s6"), (build_gpt2, None), (build_untied, "lloyd6-g32-s6")],
    ids=["llama", "gpt2", "untied"],
)
def test_the_merged_model_is_an_ordinary_dense_one_that_says_the_same(
    build, embeddings: str | None, dataset: str, tmp_path: Path
) -> None:
    folder = checkpoint_of(build(), tmp_path, ranks=(2,), embeddings=embeddings)
    adapter = run(folder, dataset, tmp_path / "out").folder
    assert write_merged(folder, adapter, tmp_path / "merged")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not any(isinstance(module, QuantizedLinear) for module in dense.modules())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (tmp_path / "merged" / "LICENSE").read_bytes() == (folder / "LICENSE").read_bytes()
    tokens = torch.arange(20)[None]
    found, expected = dense(input_ids=tokens).logits, load_tuned(folder, adapter)(input_ids=tokens).logits
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert write_merged(folder, adapter, tmp_path / "merged") is False, "it is there"
    (tmp_path / "other.merging").mkdir()
    (tmp_path / "other.merging" / "mine").touch()
    for name in ("other", "out"):
        with pytest.raises(OutputExistsError, match="a new folder"):
            write_merged(folder, adapter, tmp_path / name)


def test_a_mixture_of_experts_is_finetuned_and_not_merged(dataset: str, tmp_path: Path) -> None:
    folder = checkpoint_of(build_causal("mixtral"), tmp_path)
    adapter = run(folder, dataset, tmp_path / "out").folder
    with pytest.raises(CheckpointError, match="mixtures of experts"):
        write_merged(folder, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_curve_is_drawn(finished: Finetuned) -> None:
    picture = charts.png(charts.draw_losses, finished.report.to_json(), charts.LIGHT)
    assert picture.startswith(b"\x89PNG")
    assert picture == charts.png(charts.draw_losses, finished.report.to_json(), charts.LIGHT)


def test_the_page_and_the_readme_say_what_the_figures_say(finished: Finetuned) -> None:
    page = (finished.folder / "report" / "index.html").read_text()
    readme = (finished.folder / "README.md").read_text()
    assert f"{finished.report.kept_loss:.4g}" in page
    assert finished.report.meaning in readme
    assert "rows.jsonl" in page
    assert "<script" not in page
