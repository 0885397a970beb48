"""Adapters on packed layers: PEFT's product, the base's hash, and what is refused."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from quantizers import QuantizedLinear
from quantizers.adapter import (
    BINDING_FILE,
    LoraQuantizedLinear,
    attach_adapter,
    base_sha256,
    binding,
    for_packed,
    lora_config,
)
from tests.pipeline.tiny_packed import packed_llama, random_windows

RANKS = {"model.layers.0.self_attn.q_proj": 4, "model.layers.1.mlp.down_proj": 4, "model.layers.1.mlp.up_proj": 2}


def tuned(network=None) -> PeftModel:
    torch.manual_seed(0)
    found = get_peft_model(network or packed_llama(), lora_config(RANKS))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapter = tuned()
    adapter.save_pretrained(tmp_path)
    (tmp_path / BINDING_FILE).write_text(
        json.dumps(binding(tmp_path, base_sha256(packed_llama()), packed_llama().config))
    )
    return tmp_path


def test_each_named_layer_adds_its_product_and_no_other_is_touched() -> None:
    network = tuned()
    layers = {name: module for name, module in network.named_modules() if isinstance(module, LoraQuantizedLinear)}
    assert {name.removeprefix("base_model.model.") for name in layers} == set(RANKS)
    for name, layer in layers.items():
        out, into = layer.factors()
        assert into.shape[0] == RANKS[name.removeprefix("base_model.model.")]
        base = layer.get_base_layer()
        assert isinstance(base, QuantizedLinear)
        x = torch.randn(3, base.in_features)
        assert torch.allclose(layer(x), x @ (base.weight + out @ into).T, atol=1e-5)


def test_the_gradients_are_those_of_a_dense_layer_and_no_weight_is_kept() -> None:
    layer = next(module for module in tuned().modules() if isinstance(module, LoraQuantizedLinear))
    base = layer.get_base_layer()
    assert isinstance(base, QuantizedLinear)
    x, upstream = torch.randn(5, base.in_features, requires_grad=True), torch.randn(5, base.out_features)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        layer(x).backward(upstream)
    assert max(saved) < base.out_features * base.in_features
    into, out = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dense = (base.weight + out @ into).detach()
    assert torch.allclose(x.grad, upstream @ dense, atol=1e-5)
    assert torch.allclose(out.grad, upstream.T @ (x.detach() @ into.T), atol=1e-5)
    assert torch.allclose(into.grad, (upstream @ out).T @ x.detach(), atol=1e-5)


def test_a_saved_adapter_gives_the_same_logits_on_its_base(saved: Path) -> None:
    tokens = random_windows(2)
    expected = tuned()(input_ids=tokens).logits
    found = attach_adapter(packed_llama(), saved).eval()
    assert torch.equal(found(input_ids=tokens).logits, expected)
    assert not any(parameter.requires_grad for parameter in found.parameters())
    with found.disable_adapter():
        assert torch.equal(found(input_ids=tokens).logits, packed_llama()(input_ids=tokens).logits)


def test_on_any_other_base_it_is_an_error(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"was trained on the base .* and this model is .* any other base"):
        attach_adapter(packed_llama("lloyd3-g32-s4-r2"), saved)
    louder = packed_llama()
    with torch.no_grad():
        louder.model.norm.weight.mul_(1.1)
    with pytest.raises(ValueError, match="any other base"):
        attach_adapter(louder, saved)
    other = packed_llama()
    other.config.rms_norm_eps = 0.1
    with pytest.raises(ValueError, match=r"with another config: rms_norm_eps was 1e-06, and this model has 0\.1"):
        attach_adapter(other, saved)


def test_a_binding_of_before_and_fields_that_only_one_side_knows_are_no_hindrance(saved: Path) -> None:
    path = saved / BINDING_FILE
    known = json.loads(path.read_text())
    for config in ({"of_another_version": 1}, None):
        path.write_text(json.dumps({key: value for key, value in (known | {"config": config}).items() if value}))
        assert attach_adapter(packed_llama(), saved).active_adapters == ["default"]


def test_plain_peft_does_not_take_a_packed_layer_by_mistake(saved: Path) -> None:
    with pytest.raises(ValueError, match="not supported"):
        PeftModel.from_pretrained(packed_llama(), str(saved))


@pytest.mark.parametrize("damage", ["no binding", "no hash", "not JSON", "no config", "no files", "a list"])
def test_a_folder_without_a_bound_adapter_is_an_error(damage: str, saved: Path) -> None:
    binding = saved / "binding.json"
    if damage == "no binding":
        binding.unlink()
    elif damage == "no config":
        (saved / "adapter_config.json").unlink()
    else:
        texts = {"no hash": "{}", "not JSON": "{", "no files": '{"base_sha256": 5, "files": 7}', "a list": "[]"}
        binding.write_text(texts[damage])
    with pytest.raises(ValueError, match="holds no adapter that `bitsmith finetune` wrote"):
        attach_adapter(packed_llama(), saved)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_was_changed_is_refused(name: str, saved: Path) -> None:
    content = (saved / name).read_bytes()
    for changed in (content[:-1], content.replace(b"4", b"5", 1)):
        (saved / name).write_bytes(changed)
        with pytest.raises(ValueError, match=rf"{name} is damaged or was changed"):
            attach_adapter(packed_llama(), saved)


def test_wrapping_dequantizes_nothing(saved: Path, monkeypatch) -> None:
    """PEFT looks at each layer's weight 19 times, for its device."""
    network = packed_llama()
    monkeypatch.setattr(QuantizedLinear, "weight", property(lambda self: pytest.fail("the weight was asked for")))
    assert isinstance(attach_adapter(network, saved), PeftModel)
    assert isinstance(get_peft_model(packed_llama(), lora_config(RANKS)), PeftModel)


def test_codebook_and_format_belong_to_the_base() -> None:
    first, second, third = packed_llama(), packed_llama(), packed_llama()
    layers = [next(m for m in each.modules() if isinstance(m, QuantizedLinear)) for each in (second, third)]
    layers[0].set_levels(layers[0].levels * 3)
    layers[1].format = replace(layers[1].format, super_block=layers[1].format.super_block * 2)
    assert len({base_sha256(each) for each in (first, second, third)}) == 3


def test_the_hash_is_of_the_weights_and_not_of_the_dtype_that_the_rest_is_loaded_in() -> None:
    base = packed_llama()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(parameter.bfloat16())
    expected = base_sha256(base)
    assert base_sha256(copy.deepcopy(base).to(torch.bfloat16)) == expected
    next(module for module in base.modules() if isinstance(module, QuantizedLinear)).weight_packed[0] ^= 1
    assert base_sha256(base) != expected


@pytest.mark.parametrize("change", [{"lora_dropout": 0.5}, {"lora_bias": True}], ids=str)
def test_what_a_packed_layer_does_not_do_is_refused(change: dict[str, float | bool]) -> None:
    with pytest.raises(ValueError, match="packed layers take LoRA factors alone"):
        get_peft_model(packed_llama(), for_packed(replace(lora_config(RANKS), **change)))


def test_merging_into_codes_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="--merged"):
        tuned().merge_and_unload()
