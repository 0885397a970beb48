"""Tokens a second and memory of a packed checkpoint beside its original, dense and as bitsandbytes' NF4.

    python -m benchmarks.generation CHECKPOINT... [--model demo] [--tokens 32]

Greedy, one sequence, after a prompt of 32 tokens, each row in a process of its own, on the GPU where there is one; the
first token, which reads the prompt, is timed apart. Memory is the largest resident size of the process (of the GPU's
allocator there).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from pipeline.model import open_model
from pipeline.packed import load_packed
from pipeline.quiet import quiet_transformers
from pipeline.stages import peak_memory_bytes

PROMPT_TOKENS = 32
DENSE, NF4 = "dense", "NF4, bitsandbytes"
HEAD = """| weights | milliseconds for the prompt | tokens a second | of the dense | peak GB |
| --- | --: | --: | --: | --: |"""


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders that compress wrote")
    parser.add_argument("--model", default="demo", help="their original")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.row:
        print(json.dumps(measured(asked.row, asked.model, asked.tokens)))
        return
    print(HEAD, flush=True)
    dense_speed: float | None = None
    for row in (DENSE, NF4, *map(str, asked.checkpoints)):
        command = [sys.executable, "-m", "benchmarks.generation", *map(str, asked.checkpoints), "--row", row]
        command += ["--model", asked.model, "--tokens", str(asked.tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"| {row} | {done.stderr.strip().splitlines()[-1]} | | | |", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        dense_speed = found["speed"] if row == DENSE else dense_speed
        share = f"{found['speed'] / dense_speed:.2f}x" if dense_speed else ""
        print(
            f"| {Path(row).name} | {1000 * found['prompt_seconds']:.0f} | {found['speed']:.2f} "
            f"| {share} | {found['peak_bytes'] / 1e9:.2f} |",
            flush=True,
        )


def measured(row: str, model: str, num_tokens: int) -> dict[str, Any]:
    """Generate twice, and time the second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = _opened(row, model, device)
    prompt = torch.arange(PROMPT_TOKENS, device=network.device)[None] + 100
    _seconds(network, prompt, 2)
    prompt_seconds = _seconds(network, prompt, 1)
    seconds = _seconds(network, prompt, 1 + num_tokens) - prompt_seconds
    peak = peak_memory_bytes()
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {"prompt_seconds": prompt_seconds, "speed": num_tokens / seconds, "peak_bytes": peak}


def _opened(row: str, model: str, device: str) -> PreTrainedModel:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if row not in (DENSE, NF4):
        return load_packed(Path(row), device)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    config = {"quantization_config": nf4} if row == NF4 else {}
    with quiet_transformers():
        network = AutoModelForCausalLM.from_pretrained(open_model(model).path, dtype=dtype, **config)
    return network.eval() if row == NF4 else network.to(device).eval()


@torch.inference_mode()
def _seconds(network: Any, prompt: torch.Tensor, num_tokens: int) -> float:
    started = time.monotonic()
    with quiet_transformers():
        found = network.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    assert found.shape[1] == prompt.shape[1] + num_tokens
    if prompt.is_cuda:
        torch.cuda.synchronize()
    return time.monotonic() - started


if __name__ == "__main__":
    main()
