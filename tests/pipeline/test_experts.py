"""Mixtures of experts: every expert is compressed like any other matrix, whatever way its weights are stored."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline import unreached
from pipeline.calibration import TokenWindows
from pipeline.curvature_sums import sums_of
from pipeline.errors import ModelError
from pipeline.model import open_model
from pipeline.statistics import Statistics, collect_statistics, notes_of
from pipeline.summed_parts import num_windows_of, write_layer
from pipeline.unreached import fill_unreached, with_others_scales
from quantizers.experts import fused_experts, set_experts_apart
from tests.architectures import MIXTURES, build_causal
from tests.models import VOCAB_SIZE, save_model
from tests.pipeline.notes import Notes

TOKENS = torch.randint(0, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(0))


def _saved(model_type: str, folder: Path) -> Path:
    return save_model(build_causal(model_type), folder, dtype=torch.float32)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_apart_give_the_logits_and_gradients_of_fused_ones(model_type: str) -> None:
    fused, apart = build_causal(model_type), build_causal(model_type)
    assert fused_experts(apart)
    set_experts_apart(apart)
    assert not fused_experts(apart)
    embedded = fused.get_input_embeddings()(TOKENS).detach()
    answers = []
    for network in (fused, apart):
        read = embedded.clone().requires_grad_(True)
        logits = network(inputs_embeds=read, use_cache=False).logits
        logits.square().sum().backward()
        answers.append((logits, read.grad))
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_every_expert_is_found_in_the_files(model_type: str, tmp_path: Path) -> None:
    folder = _saved(model_type, tmp_path / "model")
    model = open_model(str(folder))
    experts = [matrix for matrix in model.matrices if ".experts." in matrix.name]
    num_mixtures = 2 if model_type == "deepseek_v3" else 3  # its first block has none
    assert len(experts) == num_mixtures * 4 * 2
    assert {matrix.kind for matrix in experts} == {"gate_up", "down"}
    assert len({matrix.group for matrix in experts}) == len(experts)  # each reads other tokens
    stored = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert model.num_params == stored
    assert not [entry for entry in model.skipped if ".experts." in entry.name and not entry.name.endswith("bias")]
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(model.load()(TOKENS).logits, loaded(TOKENS).logits, rtol=1e-4, atol=1e-5)
    apart = model.load()
    assert all(torch.equal(model.weight(each), apart.get_submodule(each.module).weight) for each in experts)
    assert len(model.hashes) == 2


def test_shards_that_share_an_expert(tmp_path: Path) -> None:
    """Gate and up in different files."""
    whole = _saved("mixtral", tmp_path / "whole")
    parts = save_model(build_causal("mixtral"), tmp_path / "parts", dtype=torch.float32, max_shard_size="8KB")
    one, many = open_model(str(whole)), open_model(str(parts))
    assert max(len(info.files) for info in many.tensors.values()) > 1
    assert len(many.hashes) == len(list(parts.glob("*.safetensors"))) + 1
    assert all(torch.equal(one.weight(a), many.weight(b)) for a, b in zip(one.matrices, many.matrices, strict=True))


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = _saved("mixtral", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    lost = [name for name in tensors if ".experts.2." in name and ".layers.1." in name]
    save_file({name: tensors[name] for name in tensors if name not in lost}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"lack 2 .*layers\.1\.mlp\.experts\.2\."):
        open_model(str(folder))


@pytest.mark.parametrize("metric", ["fisher", "kronecker", "kl"])
def test_experts_that_no_token_reached_are_named_and_take_the_mean_of_others(metric, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    network = build_causal("mixtral")
    with torch.no_grad():
        router = network.model.layers[1].mlp.gate.weight
        router[2:] = 0  # the first expert and its opposite get all tokens, as k is 1 and one of both is positive
        router[1] = -router[0]
    network.config.num_experts_per_tok = 1
    model = open_model(str(save_model(network, folder, dtype=torch.float32)))
    notes = Notes()
    tokens = torch.randint(0, VOCAB_SIZE, (4, 16), generator=torch.Generator().manual_seed(1))
    windows = TokenWindows(tokens, "0", "made up", None, 1)
    (tmp_path / "work").mkdir()
    collect_statistics(model, windows, metric, tmp_path / "work", seed=0, device="cpu", progress=notes)
    idle = [note for note in notes.said if "reached none of these experts" in note]
    assert len(idle) == 1
    assert all(f"layers.1.mlp.experts.{index}." in idle[0] for index in (2, 3))
    statistics = Statistics.open(lambda name: tmp_path / "work" / "out" / name)
    assert set(idle) <= set(notes_of(tmp_path / "work" / "out" / "statistics.json"))
    raw = load_file(tmp_path / "work" / "out" / "layer-001.safetensors")
    name = {"fisher": "fisher_diag"}.get(metric, "input_curvature")
    key = "model.layers.1.mlp.experts.{}.down" + (".weight." if metric != "kl" else ".") + name
    torch.testing.assert_close(raw[key.format(3)], (raw[key.format(0)] + raw[key.format(1)]) / 4)
    assert torch.equal(raw[key.format(3)], raw[key.format(2)])
    by_name = {matrix.name: matrix for matrix in model.matrices}
    found = statistics.of(by_name["model.layers.1.mlp.experts.3.down.weight"])
    assert (found.fisher_diag if metric == "fisher" else found.input_curvature).any()
    assert json.loads((tmp_path / "work" / "out" / "statistics.json").read_text())["metric"] == metric


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_a_kill_while_they_are_filled_in_changes_nothing(
    kill_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One idle expert in each of three layers, and one other matrix without sums."""
    model = open_model(str(save_model(build_causal("mixtral"), tmp_path / "model", dtype=torch.float32)))
    tokens = torch.randint(0, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(1))
    sums, made = sums_of("fisher"), tmp_path / "made"
    made.mkdir()
    collect_statistics(model, TokenWindows(tokens, "0", "made up", None, 1), "fisher", made, seed=0, device="cpu")
    (made / "unreached.json").unlink()
    for path in sorted((made / "out").glob("layer-*.safetensors")):
        held = load_file(path)
        empty = [name for name in held if ".experts.1." in name or "layers.0.self_attn.q_proj" in name]
        write_layer(path, held | {name: torch.zeros_like(held[name]) for name in empty}, num_windows_of(path))
    shutil.copytree(made, tmp_path / "killed")
    whole, again = Notes(), Notes()
    fill_unreached(model.matrices, made / "out", sums, whole.say)

    written = []

    def killing(*args: object) -> None:
        if len(written) == kill_at:
            raise KeyboardInterrupt
        write_layer(*args)
        written.append(args)

    with monkeypatch.context() as patch:
        patch.setattr(unreached, "write_layer", killing)
        with pytest.raises(KeyboardInterrupt):
            fill_unreached(model.matrices, tmp_path / "killed" / "out", sums, again.say)
    again.said.clear()
    fill_unreached(model.matrices, tmp_path / "killed" / "out", sums, again.say)
    assert again.said == whole.said
    assert len(whole.said) == 2
    for path in (made / "out").glob("layer-*.safetensors"):
        assert path.read_bytes() == (tmp_path / "killed" / "out" / path.name).read_bytes()


def test_a_scale_of_nothing_is_that_of_others() -> None:
    scales = {
        "a.experts.0.down": 2.0,
        "a.experts.1.down": 0.0,
        "a.experts.2.down": 4.0,
        "a.q": 0.0,
        "b.experts.0.up": 0.0,
    }
    filled = scales | {"a.experts.1.down": 3.0, "a.q": 3.0, "b.experts.0.up": 3.0}
    assert with_others_scales({"a.q": 0.0}) == {"a.q": 1.0}
    assert with_others_scales(scales) == filled
