"""What packed token embeddings (with the head that shares them) cost, everything else dense: ours beside llama.cpp's.

    python -m benchmarks.embeddings [--model demo] [--labels lloyd4-g64-s6 ...] [--peers Q8_0 Q5_0 Q4_0]
        [--unweighted]

One Markdown table: bits stored for each weight, the divergence from the original on the windows of benchmarks/quality,
and seconds to quantize. Ours are rounded under what the head reads in the windows of calibration of benchmarks/quality,
or unweighted with --unweighted. The peers are the formats that the package gguf quantizes to, with its own code.
"""

import argparse
import time
from collections.abc import Callable

import gguf
import torch
from torch import Tensor

from benchmarks.quality import Bench
from pipeline.embedding_steps import head_curvature
from pipeline.evaluate import evaluate
from pipeline.head_curvature import CURVATURE_FILE, read_curvature
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
    parser.add_argument("--unweighted", action="store_true", help="ours without what the head reads")
    asked = parser.parse_args()
    bench = Bench(asked.model, "cpu")
    run = bench.run_of("fast", 4.0, embeddings=LABELS[0])
    found = None if asked.unweighted else head_curvature(run)
    curvature = read_curvature(run.registry.path(found, CURVATURE_FILE)) if found else None
    print(HEAD, flush=True)
    for name in (*asked.labels, *asked.peers):
        for embedding in bench.model.embeddings:
            weight = bench.model.tensor(embedding.name).float()
            metric = curvature if embedding.gives_logits else None
            started = time.monotonic()
            size_bits, read = ours(name, weight, metric) if name in asked.labels else theirs(name, weight)
            seconds = time.monotonic() - started
            bench.network.get_parameter(embedding.name).data.copy_(read())
        report = evaluate(bench.network, bench.original, bench.tokens)
        print(
            f"| {name} | {size_bits / weight.numel():.3f} | {report.kl_divergence.text()} | "
            f"{100 * report.top1_agreement.mean:.1f} | {seconds:.1f} |",
            flush=True,
        )


def ours(label: str, weight: Tensor, curvature: Tensor | None) -> tuple[int, Callable[[], Tensor]]:
    """Bits, and what reads the quantized values."""
    form = quantizer_from_label(label).format
    assert isinstance(form, BlockFormat)
    quantized = quantize_rows(lambda run: weight[run.start : run.stop], tuple(weight.shape), form, curvature)
    return quantized.size_bits, quantized.dequantize


def theirs(name: str, weight: Tensor) -> tuple[int, Callable[[], Tensor]]:
    """See `ours`."""
    kind = gguf.GGMLQuantizationType[name]
    stored = gguf.quants.quantize(weight.numpy(), kind)
    return 8 * stored.nbytes, lambda: torch.from_numpy(gguf.quants.dequantize(stored, kind))


if __name__ == "__main__":
    main()
