"""Every quantizer on a device that is none of this machine's: no operation mixes tensors here and there.

Run by test_far_device.py in a process of its own; names each, and ends with an error where one does mix, or gives other
codes than here, or where rounding with feedback waits for the device at each diagonal of tiles.
"""

import torch

from quantizers import AbstractQuantizer, ErrorEstimator, LayerStatistics, LowRankPlus, quantizer_from_label
from tests.far_device import FAR, WAITED_FOR, FarTensor, install

SHAPE = (48, 80)
LABELS = ["nf3-g32-s6", "lloyd2-g32-s4", "int3-g32-s6", "kmeans2-g32-s6", "e8p2", "trellis2-l8", "vtrellis2.5-l8"]


def curvature(size: int) -> torch.Tensor:
    rows = torch.randn(4 * size, size, generator=torch.Generator().manual_seed(size))
    return rows.T @ rows / len(rows)


def metrics() -> dict[str, LayerStatistics | None]:
    rows, columns = SHAPE
    importance = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) + 0.1
    return {
        "none": None,
        "diagonal": LayerStatistics(fisher_diag=importance),
        "input": LayerStatistics(input_curvature=curvature(columns)),
        "kronecker": LayerStatistics(input_curvature=curvature(columns), output_curvature=curvature(rows)),
    }


def cost(weight: torch.Tensor, statistics: LayerStatistics | None, quantizer: AbstractQuantizer) -> float:
    return ErrorEstimator(weight, statistics, num_rows=16, seed=0).error(quantizer)


def check(label: str, rank: int) -> None:
    quantizer: AbstractQuantizer = quantizer_from_label(label)
    if rank:
        quantizer = LowRankPlus(quantizer, rank, 4)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02
    here = {name: quantizer.quantize(weight, learnt).tensors() for name, learnt in metrics().items()}
    costs = {name: cost(weight, learnt, quantizer) for name, learnt in metrics().items()}
    with _far:
        there = weight.to(FAR)
        assert isinstance(there, FarTensor)
        for name, learnt in metrics().items():
            moved = None if learnt is None else learnt.to(FAR)
            found = quantizer.quantize(there, moved)
            assert isinstance(found.dequantize(), FarTensor)
            for part, tensor in found.tensors().items():
                assert isinstance(tensor, FarTensor), f"{name}: {part} is on the CPU"
                assert torch.equal(tensor.held, here[name][part]), f"{name}: {part} differs"
            assert abs(cost(there, moved, quantizer) / costs[name] - 1) < 1e-6, name


def waits(label: str, columns: int) -> int:
    """How often it is asked for a number while a matrix of so many columns is rounded with feedback."""
    rows = SHAPE[0]
    weight = torch.randn((rows, columns), generator=torch.Generator().manual_seed(0)) * 0.02
    learnt = LayerStatistics(input_curvature=curvature(columns), output_curvature=curvature(rows))
    with _far:
        there, moved = weight.to(FAR), learnt.to(FAR)
        WAITED_FOR.clear()
        quantizer_from_label(label).quantize(there, moved)
    return len(WAITED_FOR)


_far = install()
for chosen in (*LABELS, f"{LABELS[1]} with a low-rank part"):
    print(chosen, flush=True)
    check(chosen.partition(" ")[0], 2 * (" " in chosen))
for chosen in LABELS:
    if not chosen.startswith(("kmeans", "vtrellis")):  # one ends when it is good enough, one sorts tiles by their bits
        assert waits(chosen, 64) == waits(chosen, 96), f"{chosen} waits for the device in a loop"
