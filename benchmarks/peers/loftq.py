"""LoftQ (Li et al. 2023, arXiv:2310.08659) as peft installs it: NF4 from bitsandbytes plus a rank-r part, 5 turns.

peft sends every matrix to "cuda" by name. On a machine without one, `on_this_device` lets it stay on the CPU; the
arithmetic is peft's and bitsandbytes' own. Without double quantization, as peft has it. peft keeps the factors in
float32; they are rounded to bfloat16 here and counted so, as the low-rank parts of all other rows are.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoftQConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.peers.job import Quantized, Request, main, projections

NUM_ITERATIONS = 5
BLOCK = 64


def quantize(request: Request) -> Quantized:
    """Let peft initialize LoRA layers with LoftQ; the weight is what base layer and adapter compute together."""
    if request.group != BLOCK:
        raise ValueError(f"peft's LoftQ quantizes in blocks of {BLOCK}, not of {request.group}. Ask for {BLOCK}.")
    config = LoraConfig(
        r=request.rank,
        lora_alpha=request.rank,  # a scale of 1: LoftQ's factors are not to be scaled
        target_modules=r".*_proj",
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=request.bits, loftq_iter=NUM_ITERATIONS),
    )
    model = AutoModelForCausalLM.from_pretrained(request.model, dtype=torch.float32)
    with nullcontext() if torch.cuda.is_available() else on_this_device():
        model = get_peft_model(model, config).get_base_model()
    answer = Quantized({"loftq_iter": NUM_ITERATIONS, "scaling": 1.0})
    for name, _ in projections(request.model):
        layer = model.get_submodule(name.removesuffix(".weight"))
        base = layer.base_layer.weight.data
        packed, state = quantize_4bit(base, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
        torch.testing.assert_close(dequantize_4bit(packed, state), base)  # so these are the codes that peft dequantized
        factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        for factor in factors:
            factor.data = factor.data.bfloat16().float()
        answer.weights[name] = base + layer.get_delta_weight("default").data
        answer.store("codes", [packed])
        answer.store("scales", [state.absmax])
        answer.store("low_rank", [factor.bfloat16() for factor in factors])
        answer.check_forward(answer.weights[name], layer)
    return answer


@contextmanager
def on_this_device() -> Iterator[None]:
    """While it lasts, a tensor sent to "cuda" stays where it is."""
    send = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        args = tuple("cpu" if str(arg) == "cuda" else arg for arg in args)
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        return send(tensor, *args, **kwargs)

    with patch.object(torch.Tensor, "to", to):
        yield


if __name__ == "__main__":
    main("loftq", ("peft", "bitsandbytes"), quantize)
