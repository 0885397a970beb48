"""`bitsmith finetune` as a user meets it."""

import json
from pathlib import Path

import pytest

from tests.models import build_llama
from tests.pipeline.small import SMALL
from tests.pipeline.test_finetune import ROWS, checkpoint_of

FEW = ["--steps", "2", "--batch-size", "1", "--rank", "2", "--seq-len", "64"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(build_llama(), tmp_path_factory.mktemp("base"))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


def test_finetune_then_generate_and_the_merged_model(bitsmith, checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    out, merged = tmp_path / "adapter", tmp_path / "merged"
    done = bitsmith("finetune", checkpoint, "--dataset", dataset, "-o", out, "--merged", merged, *FEW)
    assert done.code == 0, done.err
    assert "held-out loss" in done.out
    assert "parameters, 2 steps of 1 out of 10 examples" in done.err
    assert (merged / "model.safetensors").is_file()
    plain = bitsmith("generate", checkpoint, "the river", "--max-new-tokens", "2")
    said = bitsmith("generate", checkpoint, "the river", "--max-new-tokens", "2", "--adapter", out)
    assert (plain.code, said.code) == (0, 0), said.err
    few = ["--num-windows", "2", "--seq-len", "32", "--dataset", SMALL["eval_dataset"], "--json", "-q"]
    model = checkpoint.with_name("model")
    before, after = (
        bitsmith("evaluate", checkpoint, "--base", model, *few, *flags) for flags in ([], ["--adapter", out])
    )
    assert (before.code, after.code) == (0, 0), after.err
    divergences = [json.loads(each.out)["kl_divergence"]["mean"] for each in (before, after)]
    assert divergences[0] != divergences[1]
    again = bitsmith("finetune", checkpoint, "--dataset", dataset, "-o", out, "--merged", merged, *FEW, "--json", "-q")
    assert again.code == 0, again.err
    assert json.loads(again.out)["was_finished"] is True


def test_without_an_output_the_adapter_lies_beside_the_checkpoint(
    bitsmith, checkpoint: Path, dataset: Path, monkeypatch
) -> None:
    monkeypatch.chdir(checkpoint)
    done = bitsmith("finetune", ".", "--dataset", dataset, "-q", *FEW)
    assert done.code == 0, done.err
    assert done.out.split() == [f"{checkpoint}-adapter"]
    assert (checkpoint.with_name("packed-adapter") / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", "0"], "--steps is 0: input should be greater than or equal to 1"),
        (["--rank", "-1"], "--rank is -1"),
        (["--seed", str(2**44)], "--seed is 17592186044416: input should be less than"),
        (["--merged", "OUT"], "a folder each"),
        (["--learning-rate", "0"], "--learning-rate is 0.0"),
        (["--start", "middle"], "--start is 'middle': input should be 'factors' or 'zero'"),
        (["--dataset", "nowhere.jsonl"], "No text file at nowhere.jsonl"),
        (["--device", "cuda:7"], "Device 'cuda:7' cannot be used"),
    ],
)
def test_a_wrong_setting_is_one_paragraph(flags, said: str, bitsmith, checkpoint: Path, tmp_path: Path) -> None:
    flags = [str(tmp_path / "out") if flag == "OUT" else flag for flag in flags]
    done = bitsmith("finetune", checkpoint, "-o", tmp_path / "out", *flags)
    assert done.code == 1
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_checkpoint(bitsmith, tmp_path: Path) -> None:
    done = bitsmith("finetune", tmp_path)
    assert done.code == 1
    assert "is not a compressed checkpoint: it has no plan.json" in done.err


def test_a_merged_folder_that_is_not_empty_is_refused_before_the_work(
    bitsmith, checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    done = bitsmith("finetune", checkpoint, "--dataset", dataset, "-o", tmp_path / "out", "--merged", dataset.parent)
    assert done.code == 1
    assert "a new folder" in done.err
    assert not (tmp_path / "out").exists()


def test_a_machine_without_peft_is_told_what_to_install(bitsmith, checkpoint: Path, monkeypatch) -> None:
    from importlib import util

    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "peft" else real(name, *rest))
    done = bitsmith("finetune", checkpoint)
    assert done.code == 1
    assert "pip install 'bitsmith[finetune]'" in done.err
