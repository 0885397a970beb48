"""Weights that are read when they are wanted: the numbers of a loaded network, for every architecture."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import unloaded
from pipeline.layered import LayeredNetwork
from pipeline.model import open_model
from pipeline.task import task_of
from pipeline.unloaded import MergedError, Unloaded, original_network, streamed
from tests.architectures import CAUSAL, COMPUTED, build_causal
from tests.models import VOCAB_SIZE, build_llama, save_model

TOKENS = torch.randint(0, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(0))


def _answer(network: Any) -> Tensor:
    task = task_of(network.config)
    with torch.inference_mode():
        return task.answer(network, task.inputs(TOKENS))


@pytest.mark.parametrize("model_type", COMPUTED)
def test_what_is_computed_on_loading_is_loaded(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unloaded, "WHOLE_SHARE", 0.0)
    model = open_model(str(save_model(build_causal(model_type), tmp_path / "model")))
    assert torch.equal(_answer(original_network(model, "cpu")), _answer(model.load()))


@pytest.mark.parametrize("model_type", [name for name in CAUSAL if name not in COMPUTED])
def test_a_streamed_network_gives_the_loaded_one_s_answer(model_type: str, tmp_path: Path) -> None:
    model = open_model(str(save_model(build_causal(model_type), tmp_path / "model")))
    network = streamed(model, "cpu")
    assert torch.equal(_answer(network), _answer(model.load()))
    assert torch.equal(_answer(network), _answer(network))


def test_merged_weights_are_loaded_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of experts that are merged in a way that is not known."""
    monkeypatch.setattr(unloaded, "WHOLE_SHARE", 0.0)
    monkeypatch.setattr("pipeline.model.expert_tensors", lambda skeleton, names, stored: None)
    model = open_model(str(save_model(build_causal("mixtral"), tmp_path / "model")))
    with pytest.raises(MergedError, match="made from several tensors"):
        streamed(model, "cpu")
    assert torch.equal(_answer(original_network(model, "cpu")), _answer(model.load()))
    assert LayeredNetwork(model, "cpu").is_whole


def test_no_two_blocks_are_there_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(str(save_model(build_llama(num_layers=4), tmp_path / "model")))
    network, seen = streamed(model, "cpu"), []
    for number, block in enumerate(network.model.layers):
        block.self_attn.register_forward_hook(lambda *_, number=number: seen.append((number, there())))

    def there() -> set[int]:
        names = [name for name, each in network.model.layers.named_parameters() if not each.is_meta]
        return {int(name.partition(".")[0]) for name in names}

    assert there() == set()
    _answer(network)
    assert seen == [(number, {number}) for number in range(4)]
    assert there() == set()


def test_what_has_room_is_loaded(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(str(tiny_model_dir))
    for share, is_streamed in ((0.5, False), (0.0, True)):
        monkeypatch.setattr(unloaded, "WHOLE_SHARE", share)
        network = original_network(model, "cpu")
        assert any(each.is_meta for each in network.parameters()) == is_streamed


def test_a_block_s_weights_are_let_go_when_it_fails(tiny_model_dir: Path) -> None:
    held = Unloaded(open_model(str(tiny_model_dir)), "cpu", ["model.layers.0", "model.layers.1"])

    def fail_inside() -> None:
        with held.block("model.layers.1"):
            assert not held.network.get_parameter("model.layers.1.mlp.up_proj.weight").is_meta
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert held.network.get_parameter("model.layers.1.mlp.up_proj.weight").is_meta


@pytest.mark.parametrize("make", [streamed, LayeredNetwork])
def test_a_network_is_let_go_at_once(make, tiny_model_dir: Path) -> None:
    """Not at some later time, when the garbage collector finds modules that refer to one another."""
    made = make(open_model(str(tiny_model_dir)), "cpu")
    network = made.network if isinstance(made, LayeredNetwork) else made
    _answer(network) if make is streamed else made.embed(TOKENS)
    remembered = weakref.ref(network)
    gc.disable()
    try:
        del made, network
        assert remembered() is None
    finally:
        gc.enable()
