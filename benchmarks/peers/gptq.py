"""GPTQ (Frantar et al. 2022, arXiv:2210.17323) as GPTQModel does it: groups, error feedback, act-order within groups.

GPTQModel's defaults, with columns ordered by activation while groups stay contiguous (`act_group_aware`), but for the
grid: asymmetric as in the paper. Its format stores zero points either way, and GPTQModel's own loss is a quarter less.
A `g_idx` that only counts columns can be rebuilt by a runtime, so it does not count as stored.
"""

import os
from pathlib import Path

# both read on import: more workers than cores stand in each other's way; a compiled dequantization is used once
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

from benchmarks.peers.float32_copy import is_bfloat16_emulated
from benchmarks.peers.job import Quantized, Request, main, projections

CHECKPOINT = Path("checkpoint")


def quantize(request: Request) -> Quantized:
    """Quantize, save, load the saved checkpoint in float16 and dequantize each layer."""
    config = QuantizeConfig(bits=request.bits, group_size=request.group, sym=False)
    windows = request.windows()
    examples = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in windows]
    settings = ("sym", "desc_act", "act_group_aware", "damp_percent", "mse")
    answer = Quantized({name: getattr(config, name) for name in settings})
    # its own choice on a CPU is bfloat16, also where that is emulated (float32_copy.py)
    dtype = torch.float32 if is_bfloat16_emulated() else "auto"
    model = GPTQModel.load(str(request.model), config, dtype=dtype)
    model.quantize(examples, batch_size=1, backend=BACKEND.TORCH)
    model.save(str(CHECKPOINT))
    answer.store_checkpoint(CHECKPOINT, leave_out="g_idx")
    loaded = GPTQModel.load(str(CHECKPOINT), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
    for name, _ in projections(request.model):
        layer = loaded.get_submodule(name.removesuffix(".weight"))
        answer.weights[name] = layer.dequantize_weight().T
        if not torch.equal(layer.g_idx, torch.arange(len(layer.g_idx), dtype=layer.g_idx.dtype) // request.group):
            answer.store("g_idx", [layer.g_idx])
        answer.check_forward(answer.weights[name], layer)
    return answer


if __name__ == "__main__":
    main("gptq", ("gptqmodel",), quantize)
