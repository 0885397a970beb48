from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import statistics
from pipeline.calibration import token_windows
from pipeline.errors import NonFiniteError
from pipeline.model import Model, open_model
from pipeline.statistics import Statistics, collect_statistics


def windows_of(model: Model, num: int = 3):
    return token_windows(None, model.tokenizer(), num_windows=num, seq_len=24, seed=0)


def collect(model: Model, work: Path, num: int = 3) -> Statistics:
    collect_statistics(model, windows_of(model, num), work, device="cpu")
    return Statistics.open(lambda name: work / "out" / name)


@pytest.mark.parametrize("folder", ["tiny_model_dir", "odd_model_dir", "tiny_gpt2_dir"])
def test_fisher_and_moments_equal_plain_autograd(folder: str, request, tmp_path: Path) -> None:
    model = open_model(str(request.getfixturevalue(folder)))
    found = collect(model, tmp_path)
    network = model.load()
    inputs: dict[str, list[torch.Tensor]] = {}
    for matrix in model.matrices:
        network.get_submodule(matrix.module).register_forward_hook(
            lambda _, args, __, name=matrix.name: inputs.setdefault(name, []).append(args[0].detach())
        )
    expected = {matrix.name: torch.zeros(matrix.shape) for matrix in model.matrices}
    for tokens in windows_of(model).tokens:
        network.zero_grad()
        logits = network(tokens[None]).logits[0, :-1]
        nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").backward()
        for matrix in model.matrices:
            gradient = network.get_parameter(matrix.name).grad
            expected[matrix.name] += (gradient.T if matrix.transposed else gradient) ** 2
    for matrix in model.matrices:
        learnt = found.of(matrix)
        torch.testing.assert_close(learnt.fisher_diag, expected[matrix.name], rtol=1e-4, atol=1e-8)
        x = torch.cat([batch[0] for batch in inputs[matrix.name]])
        torch.testing.assert_close(learnt.input_second_moment, x.T @ x, rtol=1e-4, atol=1e-5)
        assert (learnt.num_sequences, learnt.num_tokens) == (3, 72)
        assert learnt.fisher_diag.shape == matrix.shape


def test_finished_windows_survive_an_interruption(tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    model = open_model(str(tiny_model_dir))
    (tmp_path / "whole").mkdir()
    whole = collect(model, tmp_path / "whole")
    calls, real = [], statistics._one_window

    def stop_at_third(network, tokens, running):
        calls.append(tokens)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(network, tokens, running)

    work = tmp_path / "cut"
    work.mkdir()
    monkeypatch.setattr(statistics, "SAVE_SHARE", 1e9)  # save after every window
    monkeypatch.setattr(statistics, "_one_window", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        collect(model, work)
    resumed = collect(model, work)
    assert len(calls) == 4  # two before, the interrupted one, and only that one again
    for matrix in model.matrices:
        assert torch.equal(resumed.of(matrix).fisher_diag, whole.of(matrix).fisher_diag)
        assert torch.equal(resumed.of(matrix).input_second_moment, whole.of(matrix).input_second_moment)


def test_a_non_finite_activation_names_the_layer(tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    model = open_model(str(tiny_model_dir))
    load = Model.load

    def damaged(self, **kwargs):
        network = load(self, **kwargs)
        network.get_parameter("model.layers.1.post_attention_layernorm.weight").data[0] = torch.inf
        return network

    monkeypatch.setattr(Model, "load", damaged)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.\w+ .*window 0"):
        collect(model, tmp_path)
