"""How fast do the GPU kernels read packed weights? Prints two blocks for BENCHMARKS.md, with date and card.

    python -m benchmarks.kernels              on a GPU, minutes
    python -m benchmarks.kernels --tune       the row of this card for quantizers/kernels/configs.py
    python -m benchmarks.kernels --dry-run    tiny shapes in Triton's interpreter: are the results right?

Bytes are those that a kernel has to move: codes, scales, rows in and out. They are compared to a copy from device to
device, whose bytes count twice. Weights are copied until they exceed four times the card's L2 cache, and used in turn,
in a CUDA graph: no launch costs, nothing cached. Beside ours stand torch's bfloat16 product and bitsandbytes' NF4.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from itertools import product

import torch
from torch import Tensor

from quantizers import BlockFormat
from quantizers.kernels.block_weight import BlockWeight
from quantizers.kernels.configs import CONFIGS, Config

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192))  # out, in
BITS = (2, 3, 4)
ROWS = (1, 4, 16)
COPY_BYTES = 2**30
DRY_SHAPES = ((5, 70), (70, 300))
DRY_TOLERANCE = 0.02  # of the largest value, in bfloat16
NO_GPU = "bench-kernels measures a CUDA device, and torch finds none here; `--dry-run` checks the results without one"


def main(arguments: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="no GPU: tiny shapes in the interpreter, no times")
    parser.add_argument("--tune", action="store_true", help="print a row of configurations for this card")
    told = parser.parse_args(arguments)
    if told.dry_run:
        dry_run() if os.environ.get("TRITON_INTERPRET") == "1" else interpreted_dry_run()
    elif not torch.cuda.is_available():
        sys.exit(NO_GPU)
    elif told.tune:
        print(tuned())
    else:
        measure_all()


def random_weight(shape: tuple[int, int], bits: int, device: str) -> BlockWeight:
    """Random codes and scales, blocks of 64 with 8-bit scales."""
    form = BlockFormat(bits, 64, 8, 256, "lloyd")
    generator = torch.Generator(device).manual_seed(bits)

    def random(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if dtype == torch.float32:
            return torch.rand(size, generator=generator, device=device) * 1e-4
        return torch.randint(-(2**31), 2**31, size, generator=generator, device=device).to(dtype)

    stored = {name: random(size, dtype) for name, (size, dtype) in form.plain_specs(shape).items()}
    stored["weight_packed"][-1:] = 0  # the bits after the last code
    stored["weight_scale_packed"][-1:] = 0
    return BlockWeight.from_stored(form, shape, stored, form.levels.to(device))


def weight_bytes(weight: BlockWeight) -> int:
    """Of what a kernel reads of it."""
    tensors = (*weight.planes, weight.scale_codes, weight.steps)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def interpreted_dry_run() -> None:
    """In a process of its own: Triton reads the variable when it is first imported, which transformers has done."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--dry-run"]
    sys.exit(subprocess.call(command, env=os.environ | {"TRITON_INTERPRET": "1"}))


def dry_run() -> None:
    """Every case on tiny shapes, against the reference.

    Raises:
        SystemExit: a result is wrong.
    """
    from quantizers.kernels import reference

    count = 0
    for shape, bits, rows in product(DRY_SHAPES, BITS, ROWS):
        weight = random_weight(shape, bits, "cpu")
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
        expected = reference.product(x, weight, None).float()
        error = float((weight.product(x).float() - expected).abs().max() / expected.abs().max())
        if not error < DRY_TOLERANCE:
            sys.exit(f"{shape[0]}x{shape[1]} at {bits} bits, {rows} rows: wrong by {error:.2g} of the largest value")
        count += 1
    print(f"dry run, {date.today()}: {count} products are right in Triton's interpreter; nothing was measured")


def seconds(run: Callable[[], object], times: int) -> float:
    """Of one of the `times` calls that `run` makes, by CUDA graph; the median."""
    from triton.testing import do_bench_cudagraph

    with torch.cuda.stream(torch.cuda.Stream()):
        return do_bench_cudagraph(run, rep=50, return_mode="median") / 1e3 / times


def num_copies(size_bytes: int) -> int:
    """So many that together they exceed four times the L2 cache."""
    return 1 + 4 * torch.cuda.get_device_properties(0).L2_cache_size // size_bytes


def copy_speed() -> float:
    """Bytes a second of a copy on the device, read and written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source), 1)


def copies_of(weight: BlockWeight) -> list[BlockWeight]:
    """See `num_copies`."""

    def another() -> BlockWeight:
        planes = tuple(plane.clone() for plane in weight.planes)
        return replace(weight, planes=planes, scale_codes=weight.scale_codes.clone(), steps=weight.steps.clone())

    return [another() for _ in range(num_copies(weight_bytes(weight)))]


def our_seconds(weights: list[BlockWeight], x: Tensor) -> float:
    """Of one product."""
    return seconds(lambda: [weight.product(x) for weight in weights], len(weights))


def dense_seconds(shape: tuple[int, int], x: Tensor) -> float:
    """Of torch's product in bfloat16."""
    dense = [torch.randn(shape, dtype=x.dtype, device="cuda") for _ in range(num_copies(2 * shape[0] * shape[1]))]
    return seconds(lambda: [torch.nn.functional.linear(x, weight) for weight in dense], len(dense))


def nf4_seconds(shape: tuple[int, int], x: Tensor) -> float | str:
    """Of bitsandbytes' product, or why there is none."""
    try:
        import bitsandbytes

        dense = torch.randn(shape, dtype=x.dtype, device="cuda")
        quantize = bitsandbytes.functional.quantize_4bit
        copies = [quantize(dense, blocksize=64, quant_type="nf4") for _ in range(num_copies(dense.numel() // 2))]
        return seconds(lambda: [bitsandbytes.matmul_4bit(x, codes.t(), state) for codes, state in copies], len(copies))
    except Exception as error:  # a peer that fails must not cost the rest of the table
        return f"{type(error).__name__}: {error}"[:60]


def measure_all() -> None:
    """Both tables."""
    copy = copy_speed()
    print(f"\n### Kernels, {torch.cuda.get_device_name()}, {date.today()}, torch {torch.__version__}\n")
    print(f"A copy moves {copy / 1e12:.2f} TB/s.\n")
    print("| out x in | bits | rows | us | TB/s | of copy | bf16 us | NF4 us | over bf16 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape, rows in product(SHAPES, ROWS):
        x = torch.randn(rows, shape[1], dtype=torch.bfloat16, device="cuda")
        dense, nf4 = dense_seconds(shape, x), nf4_seconds(shape, x)
        peer = nf4 if isinstance(nf4, str) else f"{nf4 * 1e6:.1f}"
        for bits in BITS:
            weights = copies_of(random_weight(shape, bits, "cuda"))
            ours = our_seconds(weights, x)
            speed = (weight_bytes(weights[0]) + 2 * rows * sum(shape)) / ours
            print(
                f"| {shape[0]}x{shape[1]} | {bits} | {rows} | {ours * 1e6:.1f} | {speed / 1e12:.2f} | "
                f"{speed / copy:.0%} | {dense * 1e6:.1f} | {peer} | {dense / ours:.2f}x |",
                flush=True,
            )
    print("\n### Dequantize to bfloat16, the same\n\n| out x in | bits | us | TB/s | of copy |")
    print("| --- | --- | --- | --- | --- |")
    for shape, bits in product(SHAPES, BITS):
        weights = copies_of(random_weight(shape, bits, "cuda"))[:4]  # what is written alone exceeds the cache
        took = seconds(lambda weights=weights: [each.dense(torch.bfloat16) for each in weights], len(weights))
        speed = (weight_bytes(weights[0]) + 2 * shape[0] * shape[1]) / took
        print(f"| {shape[0]}x{shape[1]} | {bits} | {took * 1e6:.1f} | {speed / 1e12:.2f} | {speed / copy:.0%} |")


def tuned() -> str:
    """The fastest configuration of each kernel for 8192 x 8192 at 4 bits, as a row of CONFIGS."""
    weights = copies_of(random_weight((8192, 8192), 4, "cuda"))
    row = CONFIGS.setdefault(torch.cuda.get_device_name(), {})
    for kernel, rows in {"matvec": 1, "matmul": 16, "dequantize": 0}.items():
        x = torch.randn(rows, 8192, dtype=torch.bfloat16, device="cuda")

        def run(kernel: str = kernel, x: Tensor = x) -> list[Tensor]:
            if kernel == "dequantize":
                return [weight.dense(torch.bfloat16) for weight in weights[:4]]
            return [weight.product(x) for weight in weights]

        took: dict[Config, float] = {}
        sizes = (16, 32, 64, 128) if kernel == "matmul" else (4, 8, 16, 32)
        for tile_rows, supers, warps, stages in product(
            sizes, (1,) if kernel == "matmul" else (1, 2, 4, 8), (4, 8), (1, 2, 3)
        ):
            row[kernel] = Config(tile_rows, supers, warps, stages)
            try:
                took[row[kernel]] = seconds(run, 1)
            except Exception as error:  # too much shared memory, too many registers
                print(f"{kernel} {row[kernel]}: {type(error).__name__}", file=sys.stderr)
        row[kernel] = min(took, key=lambda config: took[config])
    return f"{torch.cuda.get_device_name()!r}: {row},"


if __name__ == "__main__":
    main()
