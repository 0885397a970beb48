"""A tiny random model and its packed twin, in memory."""

import copy
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantizers import QuantizedLinear, quantizer_from_label
from tests.models import VOCAB_SIZE, build_llama

LABEL = "lloyd2-g32-s4-r2"


def packed(network: PreTrainedModel, label: str = LABEL) -> PreTrainedModel:
    """The same network with every linear layer inside its blocks packed."""
    quantizer = quantizer_from_label(label)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            network.set_submodule(name, QuantizedLinear.from_quantized(quantizer.quantize(module.weight), module.bias))
    return network


@cache
def _packed_once(label: str) -> PreTrainedModel:
    return packed(louder(build_llama()), label)


def packed_llama(label: str = LABEL) -> PreTrainedModel:
    """One of its own for each caller."""
    return copy.deepcopy(_packed_once(label))


def louder(network: PreTrainedModel) -> PreTrainedModel:
    """Weights ten times as large: at its usual start a random model predicts all tokens alike, whatever its weights."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" not in name:
                parameter.mul_(10)
    return network


def original_llama() -> PreTrainedModel:
    return louder(build_llama())


def random_windows(num: int, seq_len: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB_SIZE, (num, seq_len), generator=torch.Generator().manual_seed(seed))
