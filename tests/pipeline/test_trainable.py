"""A network opened for training computes the same, trains only what was asked for, and comes back as it was."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import RecipeError
from pipeline.trainable import GAIN, opened_for_training, save_memory
from quantizers import QuantizedLinear
from quantizers.trainable import TrainableLinear
from tests.models import build_gpt2
from tests.pipeline.tiny_packed import packed_llama, random_windows

TOKENS = random_windows(1)


def opened(network, kinds, dense_bytes: int = 0, keep_activations: bool = False):
    settings = {"dense_dtype": torch.float32, "keep_activations": keep_activations}
    return opened_for_training(network, kinds, dense_bytes=dense_bytes, **settings)


@pytest.mark.parametrize("dense_bytes", [0, 100_000, 10**9])
def test_computes_what_the_packed_network_computes(dense_bytes: int) -> None:
    network = packed_llama()
    with torch.no_grad():
        expected = network(TOKENS, use_cache=False).logits
        with opened(network, ("factors",), dense_bytes):
            torch.testing.assert_close(network(TOKENS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dense_bytes", [0, 16_383, 16_384, 100_000, 10**9])
def test_dense_copies_keep_to_their_budget(dense_bytes: int) -> None:
    with opened(network := packed_llama(), ("factors",), dense_bytes):
        copies = [m.dense for m in network.modules() if isinstance(m, TrainableLinear) and m.dense is not None]
        assert sum(copy.numel() * copy.element_size() for copy in copies) <= dense_bytes
        assert bool(copies) == (dense_bytes >= 64 * 64 * 4)


@pytest.mark.parametrize("kinds", [("factors",), ("norms",), ("scales",), ("factors", "norms", "scales")])
def test_only_what_was_asked_for_takes_a_gradient(kinds) -> None:
    network = packed_llama()
    with opened(network, kinds) as live:
        network(TOKENS, use_cache=False).logits.logsumexp(-1).sum().backward()
        moved = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
        assert moved == live.keys()
        assert any("low_rank_out" in name for name in live) == ("factors" in kinds)
        assert ("model.norm.weight" in live) == ("norms" in kinds)
        gains = {name for name in live if name.endswith(GAIN)}
        assert live.keys() - gains <= network.state_dict().keys() | packed_llama().state_dict().keys()
    assert len(gains) == 14 * ("scales" in kinds)
    assert len(live) == 2 * 14 * ("factors" in kinds) + 5 * ("norms" in kinds) + len(gains)


def test_activations_that_are_kept_give_the_same_gradients() -> None:
    found = []
    for keep_activations in (False, True):
        network = packed_llama()
        with opened(network, ("factors", "norms", "scales"), keep_activations=keep_activations) as live:
            network(TOKENS, use_cache=False).logits.logsumexp(-1).sum().backward()
            found.append({name: parameter.grad for name, parameter in live.items()})
    checkpointed, kept = found
    for name, gradient in checkpointed.items():
        torch.testing.assert_close(kept[name], gradient, rtol=0, atol=0, msg=name)


def test_biases_of_packed_layers() -> None:
    network = packed_llama()
    layer = network.get_submodule("model.layers.1.mlp.down_proj")
    layer.bias = nn.Parameter(torch.zeros(64), requires_grad=False)
    with opened(network, ("biases",)) as live:
        assert live.keys() == {"model.layers.1.mlp.down_proj.bias"}
        network(TOKENS, use_cache=False).logits.sum().backward()
        assert all(parameter.grad is not None for parameter in live.values())


def test_layer_norms_have_a_shift_too() -> None:
    with opened(build_gpt2(), ("norms",)) as live:
        assert {"transformer.ln_f.weight", "transformer.ln_f.bias"} <= live.keys()
        assert len(live) == 2 * 5


def snapshot(network) -> list:
    return [
        {name: tensor.clone() for name, tensor in network.state_dict().items()},
        {name: (type(module), module.training) for name, module in network.named_modules()},
        {name: parameter.requires_grad for name, parameter in network.named_parameters()},
    ]


@pytest.mark.parametrize("keep_activations", [False, True], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_the_network_comes_back_as_it_was(fails: bool, keep_activations: bool) -> None:
    network = packed_llama()
    network.model.norm.train()
    before = snapshot(network)

    def train() -> None:
        with opened(network, ("factors", "norms"), keep_activations=keep_activations) as live:
            for parameter in live.values():
                parameter.data.add_(1)
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            train()
    else:
        train()
    after = snapshot(network)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
    assert not network.is_gradient_checkpointing


def test_where_copies_do_not_fit_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    keep, kept = TrainableLinear.keep_dense, []

    def short(self: TrainableLinear, dtype: torch.dtype) -> None:
        if len(kept) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        kept.append(self)
        keep(self, dtype)

    monkeypatch.setattr(TrainableLinear, "keep_dense", short)
    with opened(packed_llama(), ("factors",), 10**9) as live:
        assert live
        assert len(kept) == 3
        assert not any(layer.dense is not None for layer in kept)


def test_a_flag_of_the_config_is_no_recomputing_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    network = packed_llama()
    network.gradient_checkpointing_enable()
    with opened(network, ("factors",), keep_activations=True):
        assert save_memory(network)
        assert not save_memory(network)
    assert network.is_gradient_checkpointing


def test_a_network_that_cannot_recompute_is_trained_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(packed_llama()), "supports_gradient_checkpointing", False)
    network = packed_llama()
    with opened(network, ("factors",), keep_activations=False):
        network(TOKENS, use_cache=False).logits.logsumexp(-1).sum().backward()
        assert not save_memory(network)


def test_no_dropout_while_activations_are_checkpointed() -> None:
    network = build_gpt2()
    assert network.config.resid_pdrop > 0
    with opened(network, ("norms",)):
        assert network.is_gradient_checkpointing
        first, second = (network(TOKENS, use_cache=False).logits for _ in range(2))
        assert torch.equal(first, second)
        blocks = [module for module in network.modules() if module.training]
        assert len(blocks) >= 2, "no block would be checkpointed"
    with opened(network, ("norms",), keep_activations=True):
        assert not any(module.training for module in network.modules())


def test_a_block_keeps_its_input_only() -> None:
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    network = packed_llama()
    shapes = {(m.out_features, m.in_features) for m in network.modules() if isinstance(m, QuantizedLinear)}
    with opened(network, ("factors", "norms")):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden = network.model(TOKENS, use_cache=False).last_hidden_state
        checkpointed, saved[:] = sum(tensor.numel() for tensor in saved), []
        assert hidden.requires_grad
        network.gradient_checkpointing_disable()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network.model(TOKENS, use_cache=False)
    assert checkpointed < sum(tensor.numel() for tensor in saved) / 4
    held = {tuple(tensor.shape) for tensor in saved} | {tuple(tensor.shape)[::-1] for tensor in saved}
    assert not held & shapes, "autograd keeps a dense weight"


def test_nothing_to_train_is_said() -> None:
    network = packed_llama("lloyd2-g32-s4")
    with pytest.raises(RecipeError, match=r"14 packed layers has none.*rank above 0"), opened(network, ("factors",)):
        pass
    assert isinstance(network.get_submodule("model.layers.0.mlp.up_proj"), QuantizedLinear)
