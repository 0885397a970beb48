"""Block by block, with one block's weights in memory: the numbers of the whole model, for every architecture."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.layered import LayeredNetwork, NotLayeredError
from pipeline.model import open_model
from tests.architectures import CAUSAL, build_causal
from tests.models import VOCAB_SIZE, save_model

MERGED = ("mixtral", "qwen2_moe")  # experts are stored one by one, and merged on loading


def _tokens() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", [name for name in CAUSAL if name not in MERGED])
def test_logits_are_those_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    model = open_model(str(save_model(build_causal(model_type), tmp_path / "model")))
    tokens = _tokens()
    with torch.no_grad():
        expected = model.load()(input_ids=tokens).logits
        network = LayeredNetwork(model, "cpu")
        assert network.num_blocks == 3
        hidden = network.embed(tokens)
        for index in range(network.num_blocks):
            with network.block(index):
                hidden = network.through(index, tokens, hidden)
        logits = network.head(tokens, hidden)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("model_type", MERGED)
def test_experts_that_are_merged_on_loading_are_refused_with_the_reason(model_type: str, tmp_path: Path) -> None:
    model = open_model(str(save_model(build_causal(model_type), tmp_path / "model")))
    network = LayeredNetwork(model, "cpu")
    with pytest.raises(NotLayeredError, match="merged on loading"), network.block(0):
        pass


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
