"""What the head reads, summed up block by block, is what it reads in a plain forward pass; and what comes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import head_curvature
from pipeline.errors import NonFiniteError
from pipeline.head_curvature import CURVATURE_FILE, collect_head_curvature, read_curvature
from pipeline.layered import LayeredNetwork, Network, WholeNetwork
from pipeline.model import Model, open_model
from pipeline.teacher import head_inputs
from tests.architectures import build_causal
from tests.models import save_model

TOKENS = torch.randint(0, 300, (10, 16), generator=torch.Generator().manual_seed(5))  # two parts of windows


def collected(model: Model, work: Path) -> torch.Tensor:
    work.mkdir(exist_ok=True)
    collect_head_curvature(model, TOKENS, work, device="cpu")
    return read_curvature(work / "out" / CURVATURE_FILE)


@torch.no_grad()
def expected(model: Model) -> torch.Tensor:
    network = model.load()
    with head_inputs(network) as seen:
        for window in TOKENS:
            network(**model.task.inputs(window[None]))
    read = torch.cat([each.flatten(0, -2) for each in seen]).double()
    return (read.T @ read / TOKENS.numel()).float()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "opt", "t5"])
def test_it_is_the_second_moment_of_a_plain_pass(model_type: str, tmp_path: Path) -> None:
    model = open_model(str(save_model(build_causal(model_type), tmp_path / "model", dtype=torch.float32)))
    torch.testing.assert_close(collected(model, tmp_path / "work"), expected(model), rtol=1e-4, atol=1e-5)
    assert [path.name for path in (tmp_path / "work").glob("windows-*")] == []


@pytest.mark.parametrize("num_passes", [1, 9])
def test_a_killed_call_goes_on_with_the_same_result(
    num_passes: int, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(str(tiny_model_dir))
    whole = collected(model, tmp_path / "whole")
    real, calls = head_curvature.open_network, [0]

    def stops(*arguments: Any) -> Network:
        network = real(*arguments)
        through = network.through

        def counted(index: int, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
            calls[0] += index == network.num_blocks - 1
            if calls[0] > num_passes:
                raise KeyboardInterrupt
            return through(index, tokens, hidden)

        monkeypatch.setattr(network, "through", counted)
        return network

    with monkeypatch.context() as patch:
        patch.setattr(head_curvature, "open_network", stops)
        with pytest.raises(KeyboardInterrupt):
            collected(model, tmp_path / "work")
        calls[0] = -100
        assert torch.equal(collected(model, tmp_path / "work"), whole)
    assert calls[0] == -100 + len(TOKENS) - (8 if num_passes > 8 else 0)  # what the first part left is not done again


def test_a_head_that_reads_a_nan_is_an_error(tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    model = open_model(str(tiny_model_dir))
    real = LayeredNetwork.through

    def last_is_damaged(self: LayeredNetwork, index: int, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        output = real(self, index, tokens, hidden)
        return output * torch.nan if index == self.num_blocks - 1 else output

    monkeypatch.setattr(LayeredNetwork, "through", last_is_damaged)
    with pytest.raises(NonFiniteError, match="windows 0 to 7"):
        collected(model, tmp_path / "work")


def test_a_network_that_is_no_stack_of_blocks_is_held_as_a_whole(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(str(tiny_model_dir))
    monkeypatch.setattr(head_curvature, "open_network", lambda model, device, say: WholeNetwork(model, device))
    torch.testing.assert_close(collected(model, tmp_path / "work"), expected(model), rtol=1e-4, atol=1e-5)
