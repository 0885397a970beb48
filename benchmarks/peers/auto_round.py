"""AutoRound (Cheng et al. 2023, arXiv:2309.05516) in its light setting: 50 steps of signed gradient descent a block."""

import json
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM

from benchmarks.peers.job import Quantized, Request, main, projections

# `auto-round-light`; its number of samples and their length are those of the given tokens
LIGHT = {"iters": 50, "lr": 5e-3, "batch_size": 8}
CHECKPOINT = Path("checkpoint")


def quantize(request: Request) -> Quantized:
    """Tune, save, load the saved checkpoint through transformers, and let each layer multiply the identity."""
    windows = request.windows()
    examples = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in windows]
    answer = Quantized(dict(LIGHT))
    tuner = AutoRound(
        str(request.model),
        bits=request.bits,
        group_size=request.group,
        dataset=examples,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        device_map="cpu",
        enable_torch_compile=False,
        **LIGHT,
    )
    tuner.quantize_and_save(str(CHECKPOINT), format="auto_round")
    answer.store_checkpoint(CHECKPOINT)
    checkpoint = next(CHECKPOINT.rglob("config.json")).parent
    answer.settings["sym"] = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["sym"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16, device_map="cpu")
    for name, weight in projections(request.model):
        layer = model.get_submodule(name.removesuffix(".weight"))
        with torch.no_grad():
            answer.weights[name] = layer(torch.eye(weight.shape[1], dtype=torch.float16)).T
        answer.check_forward(answer.weights[name], layer)
    return answer


if __name__ == "__main__":
    main("auto_round", ("auto-round",), quantize)
