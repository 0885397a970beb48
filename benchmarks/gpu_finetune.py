"""LoRA through packed weights of a Llama of 7 billion parameters on a GPU, beside dense ones and NF4: memory, seconds.

    python -m benchmarks.gpu_finetune [--shape 7B] [--layers 32]
    python -m benchmarks.gpu_finetune --dry-run     on any machine, a tiny model: does it all run?

Weights, texts and codes are made up: neither memory nor seconds depend on them. All rows have the same loop
(pipeline/training.py), rank and batch, new factors on every linear layer, and compute activations again in the backward
pass. Seconds are the median of the steps after the first three. Memory is the peak of the GPU's allocator; masters and
moments are in the machine's memory.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from benchmarks.gpu_model import (
    DENSE,
    NO_GPU,
    TINY,
    VOCABULARY,
    check_kernels,
    dense_network,
    linear_layers,
    pack,
    to_nf4,
)
from benchmarks.llama_shapes import SHAPES, Shape
from pipeline.conversations import Example, Examples
from pipeline.finetune import train
from pipeline.finetune_settings import FinetuneSettings
from pipeline.lora_network import open_for_finetuning
from pipeline.progress import Silent
from pipeline.trainable import checkpoint_activations
from pipeline.training_state import TrainingState

NF4 = "NF4, bitsandbytes"
LABELS = ("lloyd4-g64-s8", "lloyd3-g64-s8", "trellis3-l12")
STEPS, WARM_UP, TOKENS, BATCH = 20, 3, 512, 4  # the first steps compile
T = TypeVar("T")
HEAD = "| weights | parameters trained | seconds a step | of dense | peak GB |\n| --- | --: | --: | --: | --: |"


def main(arguments: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7B")
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--dry-run", action="store_true")
    asked = parser.parse_args(arguments)
    if not asked.dry_run and not torch.cuda.is_available():
        sys.exit(NO_GPU)
    device = "cpu" if asked.dry_run else "cuda"
    shape = TINY if asked.dry_run else SHAPES[asked.shape]
    num_layers = asked.layers or shape.num_layers
    settings = FinetuneSettings(
        steps=2 if asked.dry_run else STEPS,
        batch_size=BATCH,
        start="zero",
        check_every=STEPS,
        compute="float32" if device == "cpu" else "bfloat16",
    )
    card = "a dry run, whose figures mean nothing" if device == "cpu" else torch.cuda.get_device_name()
    model = f"{num_layers} layers of a {'tiny Llama' if asked.dry_run else asked.shape}"
    print(f"\n### Finetuning, {BATCH} x {TOKENS} tokens, {model}, {card}, {date.today()}\n\n{HEAD}", flush=True)
    dense_seconds = 0.0
    for name in (DENSE, NF4, *LABELS):
        gc.collect()  # the network before
        try:
            num_trained, seconds, peak = _trained(_opened(name, shape, num_layers, device, settings), settings)
        except Exception as error:  # a peer that fails must not cost the rest of the table
            if name != NF4:
                raise
            print(f"| {name} | failed: {type(error).__name__}: {str(error)[:80]} | | | |", flush=True)
            continue
        check_kernels()
        dense_seconds = dense_seconds or seconds
        share = f"{seconds / dense_seconds:.2f}x"
        print(f"| {name} | {num_trained:,} | {seconds:.3f} | {share} | {peak / 1e9:.2f} |", flush=True)


def _opened(name: str, shape: Shape, num_layers: int, device: str, settings: FinetuneSettings) -> PeftModel:
    """A row's network with its factors."""
    network = dense_network(shape, num_layers, device)
    if name in LABELS:
        pack(network, name)
        return open_for_finetuning(network, settings).network
    if name == NF4:
        to_nf4(network)
        network.is_loaded_in_4bit = True  # PEFT's own layers for it, which are those of QLoRA
    names = [name for name, _ in linear_layers(network)]
    tuned = get_peft_model(network, LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=names))
    checkpoint_activations(network)
    assert isinstance(tuned, PeftModel)
    return tuned


class Clock(Silent):
    """Notes when each step begins, and when the last one has ended."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def track(self, items: Iterable[T], description: str, total: int | None = None, done: int = 0) -> Iterator[T]:
        """See Progress."""
        for item in items:
            self.marks.append(time.monotonic())
            yield item
        self.marks.append(time.monotonic())

    def seconds(self) -> list[float]:
        """Of each step."""
        return [after - before for before, after in pairwise(self.marks)]


def _trained(network: PeftModel, settings: FinetuneSettings) -> tuple[int, float, int]:
    """Parameters trained, seconds a step, and the peak of the allocator in bytes, 0 without a GPU."""
    is_on_gpu = network.device.type == "cuda"
    live = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    generator = torch.Generator().manual_seed(0)
    marks = torch.arange(TOKENS) > 0
    texts = [torch.randint(VOCABULARY, (TOKENS,), generator=generator) for _ in range(2 * BATCH)]
    examples = Examples(tuple(Example(tokens, marks) for tokens in texts), "made up", None, 0, 0, 0)
    if is_on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as place:
        state = TrainingState.begin(Path(place) / "training.safetensors", {}, dict(live), torch.device("cpu"))
        clock = Clock()
        if failure := train(network, live, examples, settings, state, clock):
            raise failure
    seconds = statistics.median(clock.seconds()[WARM_UP:] or clock.seconds())
    peak = torch.cuda.max_memory_allocated() if is_on_gpu else 0
    return sum(parameter.numel() for parameter in live.values()), seconds, peak


if __name__ == "__main__":
    main()
