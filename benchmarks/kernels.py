"""How fast do the GPU kernels read packed weights? Prints three blocks for BENCHMARKS.md, with date and card.

    python -m benchmarks.kernels              on a GPU, minutes
    python -m benchmarks.kernels --tune       the row of this card for quantizers/kernels/configs.py
    python -m benchmarks.kernels --dry-run    tiny shapes in Triton's interpreter: are the results right?

Bytes are those that a kernel has to move: codes, scales, rows in and out. They are compared to a copy from device to
device, whose bytes count twice. Weights are copied until they exceed four times the card's L2 cache, and used in turn,
in a CUDA graph: no launch costs, nothing cached. Beside ours stand torch's bfloat16 product and bitsandbytes' NF4.
"levels" are Lloyd-Max codes in blocks of 64, "trellis" is the default recipe's of 4096 states, whose product includes
the rotation of the rows; its look-ups are not bytes. Of many rows (prefill), products are by dense weights, made anew.
"""

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from itertools import product

import torch
from torch import Tensor

from quantizers import BlockFormat, TrellisFormat
from quantizers.block_grid import BlockGrid
from quantizers.block_rounding import MOST_ROWS
from quantizers.kernels.abstract_weight import AbstractKernelWeight
from quantizers.kernels.block_weight import BlockWeight
from quantizers.kernels.column_feedback import columns_in_turn
from quantizers.kernels.configs import CONFIGS, DEFAULT, Config
from quantizers.kernels.scale_search import search_scales
from quantizers.kernels.trellis_weight import TrellisWeight
from quantizers.scale_search import BINS, FINE_MULTIPLES, SMALLEST_SCALE

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192))  # out, in
BITS = (2, 3, 4)
ROWS = (1, 4, 16)
PREFILL_ROWS = (512, 2048)
COPY_BYTES = 2**30
DRY_SHAPES = ((5, 70), (70, 300))
DRY_ROWS = (*ROWS, 20)  # the last as many as prefill has
DRY_TOLERANCE = 0.02  # of the largest value, in bfloat16
TUNED_SHAPE, TUNED_BLOCK = (8192, 8192), 64
NO_GPU = "this measures a CUDA device, and torch finds none here; `--dry-run` checks the results without one"


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


def random_levels(shape: tuple[int, int], bits: int, device: str) -> BlockWeight:
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


def random_trellis(shape: tuple[int, int], bits: int, device: str) -> TrellisWeight:
    """Random symbols, 4096 states."""
    form = TrellisFormat(bits, 12)
    generator = torch.Generator(device).manual_seed(bits)
    ((size, dtype),) = (spec for name, spec in form.plain_specs(shape).items() if name == "weight_packed")
    words = torch.randint(-(2**31), 2**31, size, generator=generator, device=device).to(dtype)
    stored = {"weight_packed": words, "weight_scale": torch.full((1,), 0.02, device=device)}
    return TrellisWeight.from_stored(form, shape, stored, form.levels.to(device))


KINDS: dict[str, Callable[[tuple[int, int], int, str], BlockWeight | TrellisWeight]] = {
    "levels": random_levels,
    "trellis": random_trellis,
}


def weight_bytes(weight: BlockWeight | TrellisWeight) -> int:
    """Of what a kernel streams of it."""
    if isinstance(weight, TrellisWeight):
        return weight.words.nbytes
    return sum(tensor.nbytes for tensor in (*weight.planes, weight.scale_codes, weight.steps))


def interpreted_dry_run() -> None:
    """In a process of its own: Triton reads the variable when it is first imported, which transformers has done."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--dry-run"]
    sys.exit(subprocess.call(command, env=os.environ | {"TRITON_INTERPRET": "1"}))


def dry_run() -> None:
    """Every case on tiny shapes, against the reference.

    Raises:
        SystemExit: a result is wrong.
    """
    count = 0
    for kind, shape, bits, rows in product(KINDS, DRY_SHAPES, BITS, DRY_ROWS):
        weight = KINDS[kind](shape, bits, "cpu")
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
        expected = expected_product(x, weight)
        error = float((weight.product(x).float() - expected).abs().max() / expected.abs().max())
        if not error < DRY_TOLERANCE:
            where = f"{kind}, {shape[0]}x{shape[1]} at {bits} bits, {rows} rows"
            sys.exit(f"{where}: wrong by {error:.2g} of the largest value")
        count += 1
    print(f"dry run, {date.today()}: {count} products are right in Triton's interpreter; nothing was measured")


def expected_product(x: Tensor, weight: BlockWeight | TrellisWeight) -> Tensor:
    """By the reference, in float32."""
    from quantizers.kernels import reference

    if isinstance(weight, BlockWeight):
        return reference.product(x.float(), weight, None)
    return x.float() @ weight.form.unrotate(reference.dequantize_trellis(weight, torch.float32)).T


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


def copies_of(weight: BlockWeight | TrellisWeight) -> list[BlockWeight | TrellisWeight]:
    """See `num_copies`."""
    return [copy.deepcopy(weight) for _ in range(num_copies(weight_bytes(weight)))]


def our_seconds(weights: Sequence[AbstractKernelWeight], x: Tensor) -> float:
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
    """All tables."""
    copied = copy_speed()
    print(f"\n### Kernels, {torch.cuda.get_device_name()}, {date.today()}, torch {torch.__version__}\n")
    print(f"A copy moves {copied / 1e12:.2f} TB/s.\n")
    print("| out x in | rows | kind | bits | us | TB/s | of copy | bf16 us | NF4 us | over bf16 |")
    print("| --- | --: | --- | --: | --: | --: | --: | --: | --: | --: |")
    for shape, rows in product(SHAPES, ROWS):
        for kind, bits, size_bytes, ours, dense, peer in measured_products(shape, rows):
            speed = (size_bytes + 2 * rows * sum(shape)) / ours
            print(
                f"| {shape[0]}x{shape[1]} | {rows} | {kind} | {bits} | {ours * 1e6:.1f} | {speed / 1e12:.2f} | "
                f"{speed / copied:.0%} | {dense * 1e6:.1f} | {peer} | {dense / ours:.2f}x |",
                flush=True,
            )
    print("\n### Prefill, the same\n\n| out x in | rows | kind | bits | us | TFLOP/s | bf16 us | NF4 us | over bf16 |")
    print("| --- | --: | --- | --: | --: | --: | --: | --: | --: |")
    for shape, rows in product(SHAPES, PREFILL_ROWS):
        for kind, bits, _, ours, dense, peer in measured_products(shape, rows):
            speed = 2 * rows * shape[0] * shape[1] / ours
            print(
                f"| {shape[0]}x{shape[1]} | {rows} | {kind} | {bits} | {ours * 1e6:.0f} | {speed / 1e12:.0f} | "
                f"{dense * 1e6:.0f} | {peer} | {dense / ours:.2f}x |",
                flush=True,
            )
    print("\n### Dequantize to bfloat16, the same\n\n| out x in | kind | bits | us | TB/s | of copy |")
    print("| --- | --- | --: | --: | --: | --: |")
    for shape, kind, bits in product(SHAPES, KINDS, BITS):
        weights = copies_of(KINDS[kind](shape, bits, "cuda"))[:4]  # what is written alone exceeds the cache
        took = seconds(partial(lambda some: [dense_of(each) for each in some], weights), len(weights))
        speed = (weight_bytes(weights[0]) + 2 * shape[0] * shape[1]) / took
        row = f"{shape[0]}x{shape[1]} | {kind} | {bits} | {took * 1e6:.1f}"
        print(f"| {row} | {speed / 1e12:.2f} | {speed / copied:.0%} |", flush=True)


def measured_products(shape: tuple[int, int], rows: int) -> Iterator[tuple[str, int, int, float, float, str]]:
    """Kind, bits, bytes and seconds of ours, then bfloat16's seconds and NF4's microseconds, or why there are none."""
    x = torch.randn(rows, shape[1], dtype=torch.bfloat16, device="cuda")
    dense, nf4 = dense_seconds(shape, x), nf4_seconds(shape, x)
    peer = nf4 if isinstance(nf4, str) else f"{nf4 * 1e6:.1f}"
    for kind, bits in product(KINDS, BITS):
        weights = copies_of(KINDS[kind](shape, bits, "cuda"))
        yield kind, bits, weight_bytes(weights[0]), our_seconds(weights, x), dense, peer


def dense_of(weight: BlockWeight | TrellisWeight) -> Tensor:
    """As a product of many rows needs it."""
    return weight.dense(torch.bfloat16) if isinstance(weight, BlockWeight) else weight.rotated(torch.bfloat16)


def tuned() -> str:
    """The fastest configuration of each kernel for 8192 x 8192 at 4 bits, as a row of CONFIGS."""
    card = torch.cuda.get_device_name()
    row = CONFIGS.setdefault(card, dict(CONFIGS[DEFAULT]))
    for kernel, (tiles, run) in tunable("cuda").items():
        took: dict[Config, float] = {}
        for (rows, columns), warps, stages in product(tiles, (4, 8), (1, 2, 3)):
            row[kernel] = Config(rows, columns, warps, stages)
            try:
                took[row[kernel]] = seconds(run, 1)
            except Exception as error:  # too much shared memory, too many registers
                print(f"{kernel} {row[kernel]}: {type(error).__name__}", file=sys.stderr)
        if not took:
            sys.exit(f"no configuration of {kernel} runs on {card}")
        row[kernel] = min(took, key=lambda config: took[config])
    return f"{card!r}: {row},"


def tunable(device: str) -> dict[str, tuple[list[tuple[int, int]], Callable[[], object]]]:
    """Of each kernel, rows and columns of the tiles to try, and something that it does."""
    shape = TUNED_SHAPE
    levels, trellis = (copies_of(make(shape, 4, device)) for make in KINDS.values())

    def products(weights: Sequence[BlockWeight | TrellisWeight], rows: int) -> Callable[[], object]:
        x = torch.randn(rows, shape[1], dtype=torch.bfloat16, device=device)
        return lambda: [weight.product(x) for weight in weights]

    def written(weights: Sequence[BlockWeight | TrellisWeight]) -> Callable[[], object]:
        return lambda: [dense_of(weight) for weight in weights[:4]]

    blocks = torch.randn(MOST_ROWS, shape[1] // TUNED_BLOCK, TUNED_BLOCK, device=device)  # rows as in feedback
    lloyd = BlockFormat(4, TUNED_BLOCK, 8, 256, "lloyd").levels.to(device)
    grid = BlockGrid(torch.rand(*blocks.shape[:2], 1, device=device) + 0.5, lloyd)
    right = torch.eye(TUNED_BLOCK, device=device).repeat(blocks.shape[1], 1, 1)
    flat, table = (
        torch.randn(shape[0] * shape[1] // TUNED_BLOCK, TUNED_BLOCK, device=device),
        torch.linspace(-1, 1, BINS, device=device),
    )
    tried = torch.tensor(FINE_MULTIPLES, device=device)  # made here: a graph takes no copies
    wide = list(product((4, 8, 16, 32), (256, 512, 1024, 2048)))
    return {
        "matvec": (wide, products(levels, 1)),
        "matmul": (list(product((16, 32, 64, 128), (256,))), products(levels, 16)),
        "dequantize": (wide, written(levels)),
        "trellis": (list(product((16, 32, 64), (128, 256, 512))), written(trellis)),
        "trellis_product": (list(product((16, 32, 64, 128), (64, 128, 256))), products(trellis, 16)),
        "column_feedback": (list(product((8, 16, 32, 64, 128), (1,))), lambda: columns_in_turn(blocks, grid, right)),
        "scale_search": (
            list(product((1,), (512, 1024, 2048, 4096))),
            lambda: search_scales(flat, None, table, tried, SMALLEST_SCALE),
        ),
    }


if __name__ == "__main__":
    main()
