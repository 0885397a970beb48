"""What packed token embeddings (with the head that shares them) cost, everything else dense: ours beside llama.cpp's.

    python -m benchmarks.embeddings [--model demo] [--labels lloyd4-g64-s6 ...] [--peers Q8_0 Q5_0 Q4_0]

One Markdown table: bits stored for each weight, the divergence from the original on the windows of benchmarks/quality,
and seconds to quantize. The peers are the formats that the package gguf quantizes to, with its own code.
"""

import argparse
import time
from collections.abc import Callable

import gguf
import torch
from torch import Tensor

from benchmarks.quality import Bench
from pipeline.evaluate import evaluate
from quantizers import BlockFormat, quantizer_from_label
from quantizers.rows import quantize_rows

LABELS = (
    "nf8-g64-s8",
    "lloyd6-g64-s6",
    "lloyd5-g64-s6",
    "lloyd4-g64-s6",
    "lloyd4-g32-s6",
    "lloyd3-g32-s6",
    "lloyd2-g32-s6",
)
PEERS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
HEAD = """| embeddings | bits | KL, nats/token | top-1 % | seconds |
| --- | --: | --: | --: | --: |"""


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--labels", nargs="*", default=LABELS)
    parser.add_argument("--peers", nargs="*", default=PEERS)
    asked = parser.parse_args()
    bench = Bench(asked.model, "cpu")
    print(HEAD, flush=True)
    for name in (*asked.labels, *asked.peers):
        makes = ours if name in asked.labels else theirs
        for embedding in bench.model.embeddings:
            weight = bench.model.tensor(embedding.name)
            started = time.monotonic()
            size_bits, read = makes(name, weight.float())
            seconds = time.monotonic() - started
            bench.network.get_parameter(embedding.name).data.copy_(read())
        report = evaluate(bench.network, bench.original, bench.tokens)
        print(
            f"| {name} | {size_bits / weight.numel():.3f} | {report.kl_divergence.text()} | "
            f"{100 * report.top1_agreement.mean:.1f} | {seconds:.1f} |",
            flush=True,
        )


def ours(label: str, weight: Tensor) -> tuple[int, Callable[[], Tensor]]:
    """Bits, and what reads the quantized values."""
    form = quantizer_from_label(label).format
    assert isinstance(form, BlockFormat)
    quantized = quantize_rows(lambda run: weight[run.start : run.stop], tuple(weight.shape), form)
    return quantized.size_bits, quantized.dequantize


def theirs(name: str, weight: Tensor) -> tuple[int, Callable[[], Tensor]]:
    """See `ours`."""
    kind = gguf.GGMLQuantizationType[name]
    stored = gguf.quants.quantize(weight.numpy(), kind)
    return 8 * stored.nbytes, lambda: torch.from_numpy(gguf.quants.dequantize(stored, kind))


if __name__ == "__main__":
    main()
