"""One peer's run, in a process of its own: arguments in, weights and facts out. Each peer's file calls `main`.

    python -m benchmarks.peers.PEER MODEL_FOLDER TOKENS.safetensors OUT.safetensors --bits 3 --group 64

TOKENS holds `tokens`, int64 [windows, tokens]. The facts that every peer records:

    size_bits       bits of everything the peer stores for the quantized matrices, the sum of `stored_bits`
    stored_bits     the same by kind of tensor ("qweight", "scales" ...), as the peer's own format holds them
    num_params      parameters of the quantized matrices
    seconds         reading the model, quantizing, dequantizing; without imports
    cpu_seconds     the same in processor time of all threads, which other programs on the machine change less
    peak_bytes      most resident memory of the process
    forward_error   largest difference between the peer's own layer and a product with the dequantized weight,
                    for one matrix and random inputs, over the largest output
    versions        of the packages that decide the numbers
"""

import argparse
import contextlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.peers.result import Facts, inputs_digest, save_weights

PROJECTION = "_proj"


@dataclass(frozen=True)
class Request:
    """What is asked of a peer: `rank` is of its low-rank part, 0 where it has none."""

    model: Path
    tokens: Path
    bits: int
    group: int
    rank: int

    def windows(self) -> Tensor:
        """The calibration tokens, int64 [windows, tokens]."""
        return load_file(self.tokens)["tokens"]


@dataclass
class Quantized:
    """What a peer answers: dequantized weights by name, stored bits by kind, what it was set to."""

    settings: Facts
    weights: dict[str, Tensor] = field(default_factory=dict)
    stored_bits: dict[str, int] = field(default_factory=dict)
    forward_error: float | None = None

    def store(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Count what the peer keeps of these tensors: packed widths, the dtypes as they are."""
        self.stored_bits[kind] = self.stored_bits.get(kind, 0) + sum(8 * tensor.nbytes for tensor in tensors)

    def store_checkpoint(self, folder: Path, *, leave_out: str | None = None) -> None:
        """Count the projections' tensors in a checkpoint that the peer saved; their last names are the kinds."""
        for path in sorted(folder.rglob("*.safetensors")):
            for name, tensor in load_file(path).items():
                module, _, kind = name.rpartition(".")
                if module.endswith(PROJECTION) and kind != leave_out:
                    self.store(kind, [tensor])

    def check_forward(self, weight: Tensor, forward: Callable[[Tensor], Tensor]) -> None:
        """Compare the peer's own layer with the dequantized weight once, on the first matrix it is called for."""
        if self.forward_error is None:
            self.forward_error = forward_error(weight, forward)


def is_projection(name: str) -> bool:
    """Is it the weight of a matrix that peers quantize?"""
    return name.endswith(f"{PROJECTION}.weight")


def projections(model: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and weight [out, in] of every `*_proj` matrix of a model folder, the only ones that peers quantize."""
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                if is_projection(name):
                    yield name, file.get_tensor(name)


def forward_error(weight: Tensor, forward: Callable[[Tensor], Tensor]) -> float:
    """Largest |forward(x) - x weightᵀ| over the largest |x weightᵀ|, for 16 normal inputs in the weight's dtype."""
    x = torch.randn(16, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.no_grad():
        expected = x.float() @ weight.float().T
        return float((forward(x).float() - expected).abs().max() / expected.abs().max())


def main(peer: str, packages: tuple[str, ...], quantize: Callable[[Request], Quantized]) -> None:
    """Parse the command line, run `quantize` in an empty folder, check that no matrix is missing, write the result."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.peers.{peer}")
    for name in ("model", "tokens", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--rank", type=int, default=0)
    asked = parser.parse_args()
    request = Request(asked.model.resolve(), asked.tokens.resolve(), asked.bits, asked.group, asked.rank)
    out = asked.out.resolve()
    torch.manual_seed(0)
    started, cpu_started = time.monotonic(), time.process_time()
    # some peers leave logs where they run
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        quantized = quantize(request)
    facts = {
        "peer": peer,
        "bits": request.bits,
        "group": request.group,
        "rank": request.rank,
        "inputs": inputs_digest(request.model, request.tokens),
        "settings": quantized.settings,
        "size_bits": sum(quantized.stored_bits.values()),
        "stored_bits": quantized.stored_bits,
        "num_params": sum(weight.numel() for weight in quantized.weights.values()),
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "peak_bytes": peak_bytes(),
        "num_threads": torch.get_num_threads(),
        "forward_error": quantized.forward_error,
        "versions": {package: version(package) for package in ("torch", "transformers", *packages)},
    }
    _require_all(request.model, quantized.weights)
    save_weights(out, quantized.weights, facts)


def peak_bytes() -> int:
    """Of this process alone: `ru_maxrss` is handed down by the one that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:")) * 1024


def _require_all(model: Path, weights: dict[str, Tensor]) -> None:
    for name, original in projections(model):
        if name not in weights or weights[name].shape != original.shape:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            raise ValueError(
                f"The peer returned {found} for {name}, which is {tuple(original.shape)} in {model}. Every *_proj "
                "matrix must come back under its own name: see whether this version of the peer skips some layers."
            )
        if not weights[name].isfinite().all():
            raise ValueError(f"The peer's weight {name} is not finite; the numbers of this row would mean nothing.")
