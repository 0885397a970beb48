"""A compressed folder loads packed in transformers, gives the right logits, and is refused when damaged."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantizers import (
    AbstractQuantizer,
    Integer,
    KMeans,
    LatticeCoded,
    LloydMax,
    LowRankPlus,
    NormalFloat,
    QuantizedLinear,
    QuantizedTensor,
    TrellisCoded,
    VariableTrellis,
    quantization_config,
)
from quantizers.embedding import QuantizedHead
from quantizers.transformers_plugin import BitsmithHfQuantizer
from tests.models import build_llama, save_model

# Taken in turn: every matrix of the tiny models gets another one.
MIXED: list[AbstractQuantizer] = [
    NormalFloat(4),
    LowRankPlus(LloydMax(3, 32), 4),
    LloydMax(2, 16, 4),
    LowRankPlus(NormalFloat(8, 128), 1),
    LloydMax(5, 32, 6, 16),
]
OTHER_KINDS: list[AbstractQuantizer] = [
    Integer(3, 32, 4),
    KMeans(3, 32, 4),
    TrellisCoded(3),
    VariableTrellis(2.75),
    *(LatticeCoded(bits) for bits in (2, 3, 4)),
    LowRankPlus(KMeans(2), 2),
]
LOW_RANK_MODULE = "model.layers.0.self_attn.k_proj"  # the second: MIXED[1]
IDS = torch.arange(1, 25)[None] * 7 % 384


def is_block_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D) and name != "lm_head"


def quantize_all(
    model: PreTrainedModel, *, also: tuple[str, ...] = (), quantizers: list[AbstractQuantizer] = MIXED
) -> dict[str, QuantizedTensor]:
    """Module name -> its quantized weight, as [out, in]."""
    quantized: dict[str, QuantizedTensor] = {}
    for name, module in model.named_modules():
        if is_block_linear(name, module) or name in also:
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            quantized[name] = quantizers[len(quantized) % len(quantizers)].quantize(weight)
    return quantized


def swap(model: Any, quantized: dict[str, QuantizedTensor]) -> Any:
    """The model with packed layers, made in memory."""
    for name, tensor in quantized.items():
        parent, _, child = name.rpartition(".")
        layer = QuantizedLinear.from_quantized(tensor, model.get_submodule(name).bias)
        setattr(model.get_submodule(parent), child, layer)
    return model.eval()


def write_checkpoint(source: Path, folder: Path, quantized: dict[str, QuantizedTensor]) -> Path:
    """The folder that docs/checkpoint-format.md describes, by hand."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_config(
        {name: (tensor.format, tensor.shape) for name, tensor in quantized.items()}
    )
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    prefix = "" if all(f"{name}.weight" in tensors for name in quantized) else "transformer."
    for name, tensor in quantized.items():
        stored = name.removeprefix(prefix)
        del tensors[f"{stored}.weight"]
        tensors |= {f"{stored}.{key}": value for key, value in tensor.tensors().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits.float()


@pytest.fixture(scope="module")
def quantized(tiny_model_dir: Path) -> dict[str, QuantizedTensor]:
    return quantize_all(load(tiny_model_dir))


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, quantized: dict[str, QuantizedTensor]
) -> Path:
    """Shared: never write into it."""
    return write_checkpoint(tiny_model_dir, tmp_path_factory.mktemp("packed") / "model", quantized)


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"], ids=str)
def test_every_planned_layer_is_packed_whatever_the_dtype(
    checkpoint: Path, quantized: dict[str, QuantizedTensor], dtype: torch.dtype | str
) -> None:
    model = load(checkpoint, dtype=dtype)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert packed.keys() == quantized.keys()
    assert not any(is_block_linear(name, module) for name, module in model.named_modules())
    for name, layer in packed.items():
        for key, tensor in quantized[name].tensors().items():
            assert getattr(layer, key).dtype == tensor.dtype
            assert torch.equal(getattr(layer, key), tensor)
        assert torch.equal(layer.levels, quantized[name].levels)
        assert layer.weight_packed.dtype == torch.int32
        assert layer.weight_scale_step.dtype == torch.float32
    expected = torch.bfloat16 if dtype == "auto" else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_logits_are_those_of_the_model_swapped_in_memory(
    checkpoint: Path, tiny_model_dir: Path, quantized: dict[str, QuantizedTensor]
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        original = load(tiny_model_dir, dtype=dtype)
        before = logits_of(original)
        in_memory = logits_of(swap(original, quantized))
        assert torch.equal(logits_of(load(checkpoint, dtype=dtype)), in_memory)
        assert not torch.equal(in_memory, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_format_loads_as_it_was_stored(tiny_model_dir: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    original = load(tiny_model_dir, dtype=dtype)
    quantized = quantize_all(original, quantizers=OTHER_KINDS)
    loaded = load(write_checkpoint(tiny_model_dir, tmp_path / "packed", quantized), dtype=dtype)
    for name, tensor in quantized.items():
        for key, stored in tensor.tensors().items():
            assert getattr(loaded.get_submodule(name), key).dtype == stored.dtype
    assert torch.equal(logits_of(loaded), logits_of(swap(original, quantized)))


def test_what_is_not_packed_takes_the_dtype_asked_for_whoever_loads_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers 5.17, which leaves tensors that it renames as they are stored."""
    real = BitsmithHfQuantizer._process_model_after_weight_loading

    def left_as_stored(self: BitsmithHfQuantizer, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model.model.norm.weight.data = model.model.norm.weight.data.bfloat16()
        return real(self, model, **kwargs)

    monkeypatch.setattr(BitsmithHfQuantizer, "_process_model_after_weight_loading", left_as_stored)
    for dtype in (torch.float32, torch.float16):
        assert load(checkpoint, dtype=dtype).model.norm.weight.dtype == dtype


def test_a_fresh_process_needs_only_import_quantizers(checkpoint: Path, tmp_path: Path) -> None:
    program = """
import sys
import torch
import quantizers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.arange(1, 25)[None] * 7 % 384
with torch.no_grad():
    logits = model(ids).logits
text = model.generate(ids, max_new_tokens=5, do_sample=False)
save_file({"logits": logits.contiguous(), "text": text.contiguous()}, sys.argv[2])
"""
    answer = tmp_path / "answer.safetensors"
    subprocess.run([sys.executable, "-c", program, str(checkpoint), str(answer)], check=True, cwd=Path.cwd())
    model = load(checkpoint, dtype=torch.float32)
    found = load_file(answer)
    torch.testing.assert_close(found["logits"], logits_of(model), rtol=1e-5, atol=1e-6)
    assert torch.equal(found["text"], model.generate(IDS, max_new_tokens=5, do_sample=False))


def test_generate_works(checkpoint: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tokens = load(checkpoint, dtype=dtype).generate(IDS, max_new_tokens=6, min_new_tokens=6)
        assert tokens.shape == (1, IDS.shape[1] + 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_again_it_is_the_same_model(checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = load(checkpoint, dtype=dtype)
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint, tmp_path / "again"))
    assert theirs["quantization_config"] == ours["quantization_config"]
    stored = load_file(tmp_path / "again" / "model.safetensors")
    assert stored.keys() == load_file(checkpoint / "model.safetensors").keys()
    assert torch.equal(logits_of(load(tmp_path / "again", dtype=dtype)), logits_of(model))


def test_gradients_reach_the_embeddings(checkpoint: Path) -> None:
    model = load(checkpoint, dtype=torch.float32)
    model(IDS, labels=IDS).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    assert float(gradient.norm()) > 0


def test_a_device_map_is_followed(checkpoint: Path) -> None:
    model = load(checkpoint, dtype=torch.float32, device_map={"": "cpu"})
    assert torch.equal(logits_of(model), logits_of(load(checkpoint, dtype=torch.float32)))


@pytest.mark.parametrize("places", [{"": "disk"}, {"model": "cpu", "lm_head": "meta"}], ids=str)
def test_layers_that_would_be_read_pass_by_pass_are_refused(places: dict[str, str], checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"device_map puts layers on .*Packed weights cannot be offloaded"):
        load(checkpoint, device_map=places)


def test_codes_that_were_taken_away_are_no_answer(checkpoint: Path) -> None:
    """As accelerate's offloading does, which knows nothing of a head that reads its embedding's codes."""
    layer = load(checkpoint).get_submodule(LOW_RANK_MODULE)
    layer.weight_packed = torch.empty_like(layer.weight_packed, device="meta")
    with pytest.raises(RuntimeError, match=r"on the meta device\. Packed weights cannot be offloaded"):
        layer(torch.ones(1, layer.in_features))


def test_gpt2_with_conv1d_layers_and_biases(tiny_gpt2_dir: Path, tmp_path: Path) -> None:
    original = load(tiny_gpt2_dir, dtype=torch.float32)
    quantized = quantize_all(original)
    folder = write_checkpoint(tiny_gpt2_dir, tmp_path / "gpt2", quantized)
    model = load(folder, dtype=torch.float32)
    assert isinstance(model.get_submodule("transformer.h.0.attn.c_attn"), QuantizedLinear)
    assert torch.equal(logits_of(model), logits_of(swap(original, quantized)))


def test_shapes_that_no_block_divides(odd_model_dir: Path, tmp_path: Path) -> None:
    original = load(odd_model_dir, dtype=torch.float32)
    quantized = quantize_all(original)
    folder = write_checkpoint(odd_model_dir, tmp_path / "odd", quantized)
    assert torch.equal(logits_of(load(folder, dtype=torch.float32)), logits_of(swap(original, quantized)))


def test_an_untied_head_can_be_packed_too(tmp_path: Path) -> None:
    source = save_model(build_llama(tie_word_embeddings=False), tmp_path / "source")
    original = load(source, dtype=torch.float32)
    quantized = quantize_all(original, also=("lm_head",))
    assert "lm_head" in quantized
    model = load(write_checkpoint(source, tmp_path / "packed", quantized), dtype=torch.float32)
    assert isinstance(model.lm_head, QuantizedHead)
    assert torch.equal(logits_of(model), logits_of(swap(original, quantized)))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "key",
    [
        "weight_packed",
        "weight_scale_packed",
        "weight_scale_step",
        "weight_scale_offset",
        "low_rank_out",
        "low_rank_in",
    ],
)
def test_a_missing_tensor_is_an_error(damaged: Path, key: str) -> None:
    name = f"{LOW_RANK_MODULE}.{key}"
    edit_tensors(damaged, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"{name}: expected shape .* found nothing; the checkpoint is incomplete"):
        load(damaged)


def test_a_missing_bias_is_an_error(tiny_gpt2_dir: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tiny_gpt2_dir, tmp_path / "gpt2", quantize_all(load(tiny_gpt2_dir)))
    edit_tensors(folder, lambda tensors: tensors.pop(next(key for key in tensors if key.endswith("c_attn.bias"))))
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn\.bias: expected shape \[192\], found nothing"):
        load(folder)


@pytest.mark.parametrize("tolerant", [False, True], ids=["strict", "ignore_mismatched_sizes"])
@pytest.mark.parametrize("key", ["weight_packed", "weight_scale_step", "low_rank_in"])
def test_a_wrong_shape_is_an_error(damaged: Path, key: str, tolerant: bool) -> None:
    name = f"{LOW_RANK_MODULE}.{key}"

    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    edit_tensors(damaged, cut)
    with pytest.raises((ValueError, RuntimeError), match=f"{name}: expected shape"):
        load(damaged, ignore_mismatched_sizes=tolerant)


@pytest.mark.parametrize(
    ("key", "dtype"),
    [("weight_packed", torch.int64), ("weight_scale_step", torch.bfloat16), ("low_rank_in", torch.float32)],
)
def test_a_wrong_dtype_is_an_error(damaged: Path, key: str, dtype: torch.dtype) -> None:
    name = f"{LOW_RANK_MODULE}.{key}"

    def cast(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    edit_tensors(damaged, cast)
    with pytest.raises(ValueError, match=f"{name}: expected .*, found "):
        load(damaged, dtype=torch.float32)


def test_another_format_version_is_refused_before_anything_else_is_read(damaged: Path) -> None:
    def future(config: dict[str, Any]) -> None:
        config.clear()
        config.update(quant_method="bitsmith", format_version=3, tensors={"a": 1})

    edit_config(damaged, future)
    with pytest.raises(ValueError, match="bitsmith format version 3, and this program reads versions 1 and 2; install"):
        load(damaged)


@pytest.mark.parametrize("key", ["codebooks", "matrices", "format_version"])
def test_an_incomplete_config_is_refused(damaged: Path, key: str) -> None:
    edit_config(damaged, lambda config: config.pop(key))
    with pytest.raises(ValueError, match=f"bitsmith format version None|needs .*{key}"):
        load(damaged)


@pytest.mark.parametrize("level", [[], True, None, float("nan"), "0"], ids=str)
def test_levels_that_are_no_numbers_are_refused(damaged: Path, level: Any) -> None:
    def spoil(config: dict[str, Any]) -> None:
        codebooks = config["codebooks"]
        codebooks |= {name: [level] * len(codebook) for name, codebook in codebooks.items()}

    edit_config(damaged, spoil)
    with pytest.raises(ValueError, match=r"quantization_config has no codebook .* numbers"):
        load(damaged)


@pytest.mark.parametrize("short", [False, True], ids=["missing", "short"])
def test_a_missing_codebook_is_named(damaged: Path, short: bool) -> None:
    def drop(config: dict[str, Any]) -> None:
        levels = config["codebooks"].pop("lloyd3")
        if short:
            config["codebooks"]["lloyd3"] = levels[:-1]

    edit_config(damaged, drop)
    with pytest.raises(ValueError, match="no codebook 'lloyd3' of 8 numbers"):
        load(damaged)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"bits": 7}, "bits is 7"),
        ({"rank": -1}, "rank is -1"),
        ({"colour": "red"}, "colour"),
        ({"shape": [64]}, "not enough values"),
        ({"shape": "many"}, "invalid literal"),
    ],
    ids=str,
)
def test_a_wrong_entry_names_its_module(damaged: Path, entry: dict[str, Any], reason: str) -> None:
    edit_config(damaged, lambda config: config["matrices"][LOW_RANK_MODULE].update(entry))
    with pytest.raises(ValueError, match=f"quantization_config of {LOW_RANK_MODULE} is wrong: .*{reason}"):
        load(damaged)


@pytest.mark.parametrize("key", ["shape", "bits", "codebook"])
def test_an_entry_without_a_key_names_its_module(damaged: Path, key: str) -> None:
    edit_config(damaged, lambda config: config["matrices"][LOW_RANK_MODULE].pop(key))
    with pytest.raises(ValueError, match=f"quantization_config of {LOW_RANK_MODULE} is wrong: .*{key}"):
        load(damaged)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("model.layers.7.mlp.up_proj", "has no such module"),
        ("model.layers.0.mlp", "has a LlamaMLP there, not a linear layer"),
        ("model.norm", "has a LlamaRMSNorm there, not a linear layer"),
        ("lm_head", r"has a layer of shape \[384, 64\] there, not \[96, 64\]"),
    ],
)
def test_a_module_that_is_not_there_is_named(damaged: Path, module: str, reason: str) -> None:
    def rename(config: dict[str, Any]) -> None:
        config["matrices"][module] = config["matrices"].pop("model.layers.0.mlp.up_proj")

    edit_config(damaged, rename)
    with pytest.raises(ValueError, match=f"quantized weight for {module}, and LlamaForCausalLM {reason}"):
        load(damaged)


def test_a_tied_weight_is_refused(damaged: Path) -> None:
    def add(config: dict[str, Any]) -> None:
        config["matrices"]["lm_head"] = config["matrices"][LOW_RANK_MODULE] | {"shape": [384, 64]}

    edit_config(damaged, add)
    with pytest.raises(ValueError, match="for lm_head, and LlamaForCausalLM ties that weight to another one"):
        load(damaged)


def test_a_shape_that_is_not_the_layers_is_refused(damaged: Path) -> None:
    edit_config(damaged, lambda config: config["matrices"][LOW_RANK_MODULE].update(shape=[64, 32]))
    with pytest.raises(ValueError, match=f"{LOW_RANK_MODULE}, .* has a layer of shape"):
        load(damaged)


def test_the_config_holds_the_levels_in_full(quantized: dict[str, QuantizedTensor]) -> None:
    config = json.loads(json.dumps(quantization_config({n: (t.format, t.shape) for n, t in quantized.items()})))
    assert set(config["codebooks"]) == {"nf4", "nf8", "lloyd2", "lloyd3", "lloyd5"}
    for tensor in quantized.values():
        assert torch.equal(torch.tensor(config["codebooks"][tensor.format.codebook_name]), tensor.levels)
