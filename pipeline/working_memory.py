"""What one matrix takes while it is treated, beside the program itself: measured, for shapes up to 2048 x 3072."""

from pipeline.curvature_sums import Metric, sums_of

MIB = 2**20
PROCESS_BYTES = 330 * MIB  # of a worker process that has loaded torch and the quantizers
# in all, for each weight, and for each number of the larger curvature, whose factors are made in float64
COSTS = {"diagonal": (15 * MIB, 42, 0), "curvature": (60 * MIB, 69, 31)}
QUANTIZE = {"diagonal": (15 * MIB, 40, 0), "curvature": (60 * MIB, 85, 15)}
QUANTIZE_LOW_RANK = QUANTIZE | {"diagonal": (15 * MIB, 62, 0)}


def costs_bytes(shape: tuple[int, int], metric: Metric | None) -> int:
    """While the costs of a matrix [out, in] are estimated."""
    return _total(shape, metric, COSTS)


def quantize_bytes(shape: tuple[int, int], metric: Metric | None, has_low_rank: bool) -> int:
    """While it is quantized, and the error measured."""
    return _total(shape, metric, QUANTIZE_LOW_RANK if has_low_rank else QUANTIZE)


def _total(shape: tuple[int, int], metric: Metric | None, measured: dict[str, tuple[int, int, int]]) -> int:
    sums = sums_of(metric).shapes(shape) if metric else {}
    side = max((size for name, (size, _) in sums.items() if name.endswith("_curvature")), default=0)
    overhead, a_weight, a_curvature = measured["curvature" if side else "diagonal"]
    return overhead + a_weight * shape[0] * shape[1] + a_curvature * side**2
