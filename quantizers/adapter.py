"""LoRA adapters on packed layers, through PEFT, each bound to the base that it was trained on.

y = (packed layer) x + B A x. The packed weight is dequantized for one product at a time, forward and backward, and
never kept (linear.py), so that anything that dequantizes can be finetuned through (QLoRA, arXiv:2305.14314; ModuLoRA,
arXiv:2309.16119). An adapter changes what the packed base says, so on another base it is worth nothing and may be
worse: `attach_adapter` refuses it there.

PEFT (0.21 and later) does the rest; `pip install 'bitsmith[finetune]'`.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from quantizers.embedding import PackedRows
from quantizers.linear import QuantizedLinear

BINDING_FILE = "binding.json"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
BASE_FIELD = "base_sha256"
# Fields of a config that a network's answers do not depend on, or that are told by the tensors' hash.
NO_COMPUTATION = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "quantization_config", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "_attn_implementation"),
}


class LoraQuantizedLinear(nn.Module, LoraLayer):
    """What PEFT puts in the place of a `QuantizedLinear`, which it holds as `base_layer`."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, *, config: LoraConfig, r: int, lora_alpha: int, **_: Any
    ) -> None:
        super().__init__()
        if config.lora_dropout or config.lora_bias:
            raise ValueError("packed layers take LoRA factors alone: leave lora_dropout at 0 and lora_bias off")
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_base_layer_device_and_dtype(self, base_layer: QuantizedLinear) -> tuple[torch.device, torch.dtype]:
        """PEFT would look at `weight`, and so dequantize it; factors are float32 whatever the codes stand for."""
        return base_layer.qweight.device, torch.float32

    def factors(self, adapter_name: str = "default") -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """B and A of an adapter, whose product is added to the weight."""
        out, into = self.lora_B[adapter_name].weight, self.lora_A[adapter_name].weight
        assert isinstance(out, Tensor)
        assert isinstance(into, Tensor)
        return out * self.scaling[adapter_name], into

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """The product in the dtype of `x`, or of autocast."""
        y = self.base_layer(x)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.lora_A:
                out, into = self.factors(name)
                is_cast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
                low = nn.functional.linear(x if is_cast else x.to(into.dtype), into)
                y = y + nn.functional.linear(low, out).to(y.dtype)
        return y

    def merge(self, *_: Any, **__: Any) -> None:
        """Not possible: the codes cannot take the change in.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "a packed layer cannot take an adapter into its codes: `bitsmith finetune --merged FOLDER` writes a dense "
            "model with the adapter inside"
        )


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without what PEFT says of layers that are none of its own, and what it uses of transformers'."""
    with warnings.catch_warnings():
        for message in ("Unsupported layer type", "`is_gradient_checkpointing`"):
            warnings.filterwarnings("ignore", message)
        yield


def lora_config(ranks: dict[str, int]) -> LoraConfig:
    """PEFT's settings for an adapter of that rank on each named module, with a scaling of 1.

    Args:
        ranks: module name -> rank, 1 or more.
    """
    usual = mode(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=list(ranks),
        rank_pattern=dict(others),
        alpha_pattern=dict(others),
        task_type="CAUSAL_LM",
    )
    return for_packed(config)


def for_packed(config: LoraConfig) -> LoraConfig:
    """The same settings, with which PEFT knows packed layers."""
    config._register_custom_module({QuantizedLinear: LoraQuantizedLinear})
    return config


def base_sha256(network: PreTrainedModel) -> str:
    """What a base is told by: all packed tensors with their formats and codebooks, and the rest rounded to bfloat16.

    The rest may be loaded in another dtype than it is stored in; packed tensors keep theirs.
    """
    digest = hashlib.sha256()
    kinds = QuantizedLinear | PackedRows
    packed = {name: module for name, module in network.named_modules() if isinstance(module, kinds)}
    for name, layer in sorted(packed.items()):
        digest.update(f"{name} {json.dumps(layer.format.to_json(), sort_keys=True)}\n".encode() + _bytes(layer.levels))
    for name, tensor in sorted(network.state_dict().items()):
        module, _, key = name.rpartition(".")
        is_rounded = tensor.is_floating_point() and (module not in packed or key == "bias")
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor.to(torch.bfloat16) if is_rounded else tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def binding(folder: Path, base: str, config: PretrainedConfig) -> dict[str, Any]:
    """Content of BINDING_FILE: it binds the adapter in `folder` to the base of that `base_sha256`, and its files.

    Args:
        config: the base's, which says what it does with the same tensors.
    """
    files = {name: hash_of(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    return {BASE_FIELD: base, "config": _computation(config), "files": files}


def _computation(config: PretrainedConfig) -> dict[str, Any]:
    """What decides a network's answers, as JSON gives it back."""
    stored = {name: value for name, value in config.to_dict().items() if name not in NO_COMPUTATION}
    return dict(json.loads(json.dumps(stored, default=str)))


def _differs(before: Any, now: Any) -> bool:
    if isinstance(before, dict) and isinstance(now, dict):
        return any(_differs(before[name], now[name]) for name in before.keys() & now.keys())
    return bool(before != now)


def hash_of(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def attach_adapter(network: PreTrainedModel, folder: str | Path) -> PeftModel:
    """`network` with the adapter that `bitsmith finetune` wrote into `folder`; PEFT changes the network in place.

    Args:
        network: the packed base, as transformers loads it.
    Raises:
        ValueError: the adapter was trained on another base, or the folder has none, or a damaged one.
    """
    folder = Path(folder)
    try:
        binding = json.loads((folder / BINDING_FILE).read_text(encoding="utf-8"))
        wanted, files, said = str(binding[BASE_FIELD]), dict(binding["files"]), dict(binding.get("config", {}))
        changed = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if hash_of(folder / name) != files.get(name)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no adapter that `bitsmith finetune` wrote ({error})") from error
    if changed:
        raise ValueError(f"{folder / changed[0]} is damaged or was changed after it was written")
    found = base_sha256(network)
    if found != wanted:
        raise ValueError(
            f"the adapter in {folder} was trained on the base {wanted[:12]}, and this model is {found[:12]}: on any "
            "other base its factors mean nothing. Load the checkpoint that its README.md names, packed, in its own "
            "dtype or in float32"
        )
    now = _computation(network.config)
    # those alone that both know: another version of transformers has other fields
    if other := [name for name, value in said.items() if name in now and _differs(value, now[name])]:
        raise ValueError(
            f"the adapter in {folder} was trained on a base of the same tensors with another config: {other[0]} was "
            f"{said[other[0]]!r}, and this model has {now[other[0]]!r}. Load the checkpoint that its README.md names"
        )
    config = for_packed(LoraConfig.from_pretrained(str(folder)))
    with quiet_peft():
        return PeftModel.from_pretrained(network, str(folder), config=config)
