"""A packed network with trainable LoRA factors on its layers, and the factors as PEFT stores them.

`start` says where the factors begin:

    zero       new ones on every packed layer, B = 0 (LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314)
    factors    the checkpoint's own L1 and L2 where it has a low-rank part (LQ-LoRA, arXiv:2311.12023), else new ones

Either way the result is an addition to the checkpoint as it is. Trained L1' and L2' become B = [L1' -L1] and
A = [L2'; L2], twice the rank, so that every reader of LoRA factors reads them right.
"""

from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import RecipeError
from pipeline.finetune_settings import FinetuneSettings
from pipeline.trainable import checkpoint_activations
from quantizers import QuantizedLinear
from quantizers.adapter import LoraQuantizedLinear, lora_config, quiet_peft
from solvers.low_rank import Factors

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Opened:
    """A packed network with trainable factors on its layers.

    Attributes:
        live: the parameters to train, by name.
        replaced: module -> the checkpoint's own factors, where trained ones stand in for them.
    """

    network: PeftModel
    live: dict[str, nn.Parameter]
    replaced: dict[str, Factors]

    @property
    def stored_ranks(self) -> dict[str, int]:
        """Module -> rank of `adapter`."""
        ranks = {_module(name): layer.r["default"] for name, layer in _lora_layers(self.network).items()}
        return {name: rank * (1 + (name in self.replaced)) for name, rank in ranks.items()}

    def adapter(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The trained factors as PEFT stores them, an addition to the whole checkpoint; on the CPU, float32."""
        found: dict[str, Tensor] = {}
        for name in _lora_layers(self.network):
            into, out = (values[f"{name}.{kind}.default.weight"].cpu() for kind in ("lora_A", "lora_B"))
            if (own := self.replaced.get(_module(name))) is not None:
                into = torch.cat([into, own.into.cpu()])
                out = torch.cat([out, -own.out.cpu()], dim=1)
            found |= {f"{name}.lora_A.weight": into.contiguous(), f"{name}.lora_B.weight": out.contiguous()}
        return found


def open_for_finetuning(
    network: PreTrainedModel, settings: FinetuneSettings, *, keep_activations: bool = False
) -> Opened:
    """`network`, changed in place, with all but the trained factors frozen.

    Args:
        keep_activations: instead of computing each block's again in the backward pass.
    Raises:
        RecipeError: nothing would be trained.
    """
    packed = {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    replaced: dict[str, Factors] = {}
    for name, layer in packed.items():
        quantized = layer.quantized()
        if settings.start == "factors" and quantized.low_rank is not None:
            replaced[name] = quantized.low_rank.factors()
            plain = QuantizedLinear.from_quantized(quantized.without_low_rank(), layer.bias)
            network.set_submodule(name, plain)
    ranks = {name: replaced[name].out.shape[1] if name in replaced else settings.rank for name in packed}
    ranks = {name: rank for name, rank in ranks.items() if rank}
    if not ranks:
        raise RecipeError(
            f"Nothing would be trained: the rank is 0, and none of the {len(packed)} packed layers has factors of its "
            "own to start from. Give --rank 1 or more, for example 16."
        )
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        with quiet_peft():
            tuned = get_peft_model(network, lora_config(ranks))
    assert isinstance(tuned, PeftModel)
    live = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, own in replaced.items():
            live[f"{PEFT_PREFIX}{name}.lora_A.default.weight"].copy_(own.into)
            live[f"{PEFT_PREFIX}{name}.lora_B.default.weight"].copy_(own.out)
    if keep_activations or not network.supports_gradient_checkpointing:
        network.eval()
    else:
        checkpoint_activations(network)
    return Opened(tuned, live, replaced)


def _module(name: str) -> str:
    """The name in the checkpoint of what PEFT calls `name`."""
    return name.removeprefix(PEFT_PREFIX)


def _lora_layers(network: PeftModel) -> dict[str, LoraQuantizedLinear]:
    return {name: module for name, module in network.named_modules() if isinstance(module, LoraQuantizedLinear)}
