"""Compiles kernels for sm_90, which needs no GPU, and prints one JSON line a variant: its name and what came out.

    TRITON_INTERPRET=0 python -m tests.quantizers.kernels.compile_sm90 [--few]

A process of its own, since in the tests' Triton is an interpreter. `--few` takes each kernel once.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantizers.kernels.column_feedback import column_feedback_kernel
from quantizers.kernels.configs import CONFIGS, DEFAULT
from quantizers.kernels.dequantize import dequantize_kernel
from quantizers.kernels.layout import PLANE_BITS, SUPERBLOCK
from quantizers.kernels.matmul import matmul_kernel
from quantizers.kernels.matvec import matvec_kernel
from quantizers.kernels.scale_search import scale_search_kernel
from quantizers.kernels.trellis import trellis_kernel, trellis_product_kernel
from quantizers.kernels.viterbi import num_warps, viterbi_kernel
from quantizers.scale_search import BINS, SMALLEST_SCALE

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
DOT = {torch.float32: triton.language.float32, torch.float16: triton.language.float16}
DOT[torch.bfloat16] = triton.language.bfloat16
# bits, block size, integers or levels, dtype, rank, bits of a factor: all widths; then everything else once.
VARIANTS = [
    *((bits, 64, False, torch.bfloat16, 0, 16) for bits in PLANE_BITS),
    (2, 16, True, torch.float16, 8, 16),
    (3, 32, False, torch.float16, 24, 8),
    (2, 64, False, torch.float32, 0, 16),
    (4, 128, True, torch.bfloat16, 8, 8),
]


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Name, kernel, signature, constants and options of each."""
    configs = CONFIGS[DEFAULT]
    for bits, block, is_integer, dtype, rank, factor_bits in VARIANTS:
        low, high = (*PLANE_BITS[bits], 0)[:2]
        planes = ["*i16" if width == 1 else "*i32" for width in (low, high or low)]
        weight = dict(
            zip(
                ("low_plane", "high_plane", "levels", "scale_codes", "steps", "offset", "zeros"),
                (*planes, "*fp32", "*u8", "*fp32", "*fp32", "*u8"),
                strict=True,
            )
        )
        factors = {"factor": "*i16" if factor_bits == 16 else "*u8", "factor_scale": "*i16"}
        sizes = {"N": "i32", "K": "i32"}
        ours = {"LOW": low, "HIGH": high, "BLOCK": block, "SUPER_BLOCK": 256, "INTEGER": is_integer}
        data = POINTERS[dtype]
        name = f"{bits} bits, blocks of {block}, {'integers' if is_integer else 'levels'}, {dtype}, rank {rank}"
        fused = {"x": data, **weight, "inner": data, **factors}
        low_rank = {"RANK": rank, "FACTOR_BITS": factor_bits}
        for kernel, config in configs.items():
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            tile = {"ROWS": config.rows}
            if kernel == "dequantize":
                constants = ours | tile | {"SUPERS": config.columns // SUPERBLOCK}
                yield f"dequantize, {name}", dequantize_kernel, {"out": data, **weight, **sizes}, constants, options
            elif kernel == "matvec":
                constants = ours | low_rank | tile | {"SUPERS": config.columns // SUPERBLOCK, "SPLITS": 4}
                yield f"matvec, {name}", matvec_kernel, {**fused, "out": "*fp32", **sizes}, constants, options
            elif kernel == "matmul":
                constants = ours | low_rank | tile | {"DOT": DOT[dtype], "SPLITS": 1}
                yield f"matmul, {name}", matmul_kernel, {**fused, "out": data, "M": "i32", **sizes}, constants, options
    for bits, state_bits in itertools.product(range(1, 6), (8, 12)):
        signature = {"out": "*bf16", "words": "*i32", "levels": "*fp32", "scale": "*fp32"}
        signature |= {"N": "i32", "K": "i32"}
        config = configs["trellis"]
        constants = {"BITS": bits, "STATE_BITS": state_bits, "ROWS": config.rows, "TILES": config.columns // 16}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        yield f"trellis, {bits} bits, states of {state_bits}", trellis_kernel, signature, constants, options
        config = configs["trellis_product"]
        for dtype in (torch.float16, torch.bfloat16):
            signature = {"x": POINTERS[dtype], "out": "*fp32", "words": "*i32", "levels": "*fp32", "scale": "*fp32"}
            signature |= {"M": "i32", "N": "i32", "K": "i32"}
            constants = {"BITS": bits, "STATE_BITS": state_bits, "DOT": DOT[dtype], "SPLITS": 4}
            constants |= {"ROWS": config.rows, "TILES": config.columns // 16}
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            name = f"trellis_product, {bits} bits, states of {state_bits}, {dtype}"
            yield name, trellis_product_kernel, signature, constants, options
            yield f"{name}, one row", trellis_product_kernel, signature, constants | {"M": 1}, options
        data = dict.fromkeys(("best", "values", "levels"), "*fp32")
        signature = {"symbols": "*u8", **data, "steps": "i32", "join": "i32"}
        constants, options = {"BITS": bits, "STATE_BITS": state_bits}, {"num_warps": num_warps(2**state_bits)}
        yield f"viterbi, {bits} bits, states of {state_bits}", viterbi_kernel, signature, constants, options
    for size, is_weighted in ((16, True), (128, False)):
        signature = dict.fromkeys(("scales", "blocks", "weights", "table", "multiples"), "*fp32") | {
            "num_blocks": "i32"
        }
        constants = {"SIZE": size, "PADDED": size, "BINS": BINS, "SMALLEST": SMALLEST_SCALE, "TRIALS": 6}
        constants |= {"WEIGHTED": is_weighted, "ROWS": 2048 // size}
        yield f"scale_search, blocks of {size}", scale_search_kernel, signature, constants, {"num_warps": 4}
    for bits, width, is_integer in ((2, 16, True), (4, 64, False), (8, 128, False)):
        data = ("values", "target", "right", "scales", "zeros", "levels", "bounds")
        signature = {"codes": "*u8", **dict.fromkeys(data, "*fp32"), "N": "i32", "num_tiles": "i32"}
        constants = {"WIDTH": width, "PADDED": width, "NUM_LEVELS": 2**bits, "INTEGER": is_integer, "ROWS": 32}
        name = f"column_feedback, {bits} bits, blocks of {width}"
        yield name, column_feedback_kernel, signature, constants, {"num_warps": 4}


def few() -> list:
    """Each kernel with two planes, look-up and factors of 8 bits, and one with integers."""
    names = (
        "3 bits, blocks of 32",
        "dequantize, 2 bits, blocks of 16, integers",
        "trellis, 3 bits, states of 8",
        "trellis_product, 4 bits, states of 12, torch.bfloat16, one row",
        "trellis_product, 3 bits, states of 12, torch.bfloat16",
        "viterbi, 3 bits, states of 12",
        "scale_search, blocks of 16",
        "column_feedback, 4 bits",
    )
    return [each for each in variants() if any(name in each[0] for name in names)]


def main() -> None:
    """See the module."""
    for name, kernel, signature, constants, options in few() if "--few" in sys.argv else variants():
        signature = signature | dict.fromkeys(constants, "constexpr")
        signature = {argument: signature[argument] for argument in kernel.arg_names}  # in the kernel's order
        source = ASTSource(kernel, signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(
            json.dumps(
                {
                    "name": name,
                    "cubin_bytes": len(compiled.asm["cubin"]),
                    "shared_bytes": compiled.metadata.shared,
                    "mma": compiled.asm["ptx"].count("mma"),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
