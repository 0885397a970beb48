"""Finetuning through packed weights beside LoRA on the dense original and on bitsandbytes' NF4 (QLoRA).

    python -m benchmarks.finetune [--model demo] [--budget 3.0bpw] [--preset default] [--steps 100] [--dataset FILE]

All rows have the same examples, steps, rank and loop (pipeline/training.py), each in a process of its own; memory is
the largest resident size of that process (the peak of a GPU's allocator), and what Python with its libraries takes
before a model is loaded.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipeline.conversations import read_examples
from pipeline.finetune import train
from pipeline.finetune_settings import FinetuneSettings
from pipeline.home import home
from pipeline.lora_network import open_for_finetuning
from pipeline.model import Model, open_model
from pipeline.packed import load_packed
from pipeline.progress import SILENT
from pipeline.stages import peak_memory_bytes
from pipeline.training import compute_of
from pipeline.training_state import TrainingState

HEAD = """| weights | bits | parameters trained | held-out loss | seconds a step | peak GB | GB before the model |
| --- | --: | --: | --: | --: | --: | --: |"""
ROWS = ("packed, factors", "packed, zero", "NF4, bitsandbytes", "dense, float32")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--budget", default="3.0bpw")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dataset")
    parser.add_argument("--checkpoint", type=Path, help="of the model, instead of making one")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.row:
        print(json.dumps(measured(asked.row, asked.checkpoint, asked.model, asked.dataset, asked.steps)))
        return
    checkpoint = asked.checkpoint or _compressed(asked.model, asked.budget, asked.preset)
    print(HEAD, flush=True)
    for row in ROWS:
        flags = ["--row", row, "--checkpoint", checkpoint, "--model", asked.model, "--steps", asked.steps]
        flags += ["--dataset", asked.dataset] if asked.dataset else []
        command = [sys.executable, "-m", "benchmarks.finetune", *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"| {row} | {done.stderr.strip().splitlines()[-1]} | | | | | |", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {row} | {found['bits']:.3f} | {found['num_trained']:,} | {found['start']:.3f} to {found['kept']:.3f} "
            f"| {found['seconds']:.2f} | {found['peak'] / 1e9:.2f} | {found['empty'] / 1e9:.2f} |",
            flush=True,
        )


def measured(row: str, checkpoint: Path, model: str, dataset: str | None, steps: int) -> dict[str, Any]:
    """Train, and say what it took."""
    empty = _peak_bytes()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = FinetuneSettings(steps=steps, compute=compute_of(device), start="zero" if "zero" in row else "factors")
    network, bits = _opened(row, checkpoint, open_model(model), settings, device)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    examples = read_examples(
        dataset, tokenizer, seq_len=settings.seq_len, most_rows=settings.most_rows, revision=None, progress=SILENT
    )
    live = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    with tempfile.TemporaryDirectory() as place:
        state = TrainingState.begin(Path(place) / "training.safetensors", {}, dict(live), torch.device("cpu"))
        started = time.monotonic()
        failure = train(network, live, examples, settings, state, SILENT)
    if failure:
        raise failure
    return {
        "bits": bits,
        "num_trained": sum(parameter.numel() for parameter in live.values()),
        "start": state.checks[0].held_out_loss,
        "kept": min(check.held_out_loss for check in state.checks),
        "seconds": (time.monotonic() - started) / steps,
        "peak": _peak_bytes(),
        "empty": empty,
    }


def _opened(
    row: str, checkpoint: Path, model: Model, settings: FinetuneSettings, device: str
) -> tuple[PeftModel, float]:
    """The network to train, and the bits of a weight that its linear layers have in memory."""
    if row.startswith("packed"):
        plan = json.loads((checkpoint / "plan.json").read_text())
        return open_for_finetuning(load_packed(checkpoint, device), settings, keep_activations=True).network, plan[
            "bits_per_param"
        ]
    load: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_pretrained
    dtype = torch.float32 if device == "cpu" else "auto"  # as load_packed takes it
    if row.startswith("NF4"):
        from transformers import BitsAndBytesConfig

        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        network, bits = load(model.path, quantization_config=nf4, dtype=dtype), 4.127
    else:
        network = load(model.path, dtype=dtype).to(device)
        bits = 8.0 * network.dtype.itemsize
    network.requires_grad_(False)
    torch.manual_seed(settings.seed)
    names = [matrix.module for matrix in model.matrices]
    tuned = get_peft_model(network, LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=names))
    network.eval()
    assert isinstance(tuned, PeftModel)
    return tuned, bits


def _compressed(model: str, budget: str, preset: str) -> Path:
    out = home() / "finetune" / f"{budget}-{preset}"
    command = [sys.executable, "-m", "pipeline", "compress", model, "--budget", budget, "--preset", preset]
    subprocess.run([*command, "-o", str(out), "-q"], check=True, stdout=subprocess.DEVNULL)
    return out


def _peak_bytes() -> int:
    """Of the GPU's allocator where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_memory_bytes()


if __name__ == "__main__":
    main()
