"""Block by block, with one block's weights in memory: the numbers of the whole model, for every architecture."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline import layered
from pipeline.layered import LayeredNetwork, NotLayeredError
from pipeline.model import Model, open_model
from tests.architectures import CAUSAL, WHOLE, build_causal
from tests.models import VOCAB_SIZE, save_model


def _tokens() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(0))


def _answer(model: Model, tokens: Tensor) -> Tensor:
    """Of the loaded model; with its keys and values kept, as a user would run it."""
    inputs = {name: value for name, value in model.task.inputs(tokens).items() if name != "use_cache"}
    return model.task.answer(model.load(), inputs)


@pytest.mark.parametrize("model_type", [name for name in CAUSAL if name not in WHOLE])
def test_answers_are_those_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    model = open_model(str(save_model(build_causal(model_type), tmp_path / "model")))
    tokens = _tokens()
    with torch.no_grad():
        expected = _answer(model, tokens)
        network = LayeredNetwork(model, "cpu")
        assert network.num_blocks == 3
        assert not network.is_whole
        hidden = network.embed(tokens)
        for index in range(network.num_blocks):
            with network.block(index):
                hidden = network.through(index, tokens, hidden)
        answer = network.head(tokens, hidden)
    assert torch.equal(answer, expected)


@pytest.mark.parametrize("model_type", WHOLE)
def test_what_has_two_stacks_or_passes_more_is_one_block(model_type: str, tmp_path: Path) -> None:
    model = open_model(str(save_model(build_causal(model_type), tmp_path / "model")))
    said: list[str] = []
    network = layered.open_network(model, "cpu", said.append)
    reasons = "has 2 stacks|passes more than hidden states|cannot be probed|does not call each block .* once"
    assert re.search(reasons, said[0])
    tokens = _tokens()
    with torch.no_grad(), network.block(0):
        answer = network.head(tokens, network.through(0, tokens, network.embed(tokens)))
        expected = _answer(model, tokens)
    torch.testing.assert_close(answer, expected)
    assert {matrix.layer for matrix in model.matrices} == set(network.layers(0))


def test_a_network_that_is_more_than_its_blocks_is_one_block(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an architecture is held that changes the hidden states between blocks."""

    def refuse(model: Model) -> None:
        raise NotLayeredError("it changes what a block gives")

    monkeypatch.setattr(layered, "blocks_of", refuse)
    model, said = open_model(str(tiny_model_dir)), []
    network = layered.open_network(model, "cpu", said.append)
    assert said == ["The whole model is held in memory: it changes what a block gives"]
    tokens = _tokens()
    with torch.no_grad(), network.block(0):
        answer = network.head(tokens, network.through(0, tokens, network.embed(tokens)))
        assert torch.equal(answer, model.load()(input_ids=tokens).logits[:, :-1])
    assert {matrix.layer for matrix in model.matrices} <= set(network.layers(0))


def test_outside_of_a_block_its_weights_are_not_there(tiny_model_dir: Path) -> None:
    network = LayeredNetwork(open_model(str(tiny_model_dir)), "cpu")
    blocks = network.network.get_submodule("model.layers")

    def there() -> list[str]:
        return [name for name, each in blocks.named_parameters() if each.device.type != "meta"]

    assert there() == []
    with network.block(1):
        assert there()
        assert all(name.startswith("1.") for name in there())
    assert there() == []
