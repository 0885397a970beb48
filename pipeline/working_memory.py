"""What one matrix takes while it is treated, beside the program itself: measured, for shapes up to 2048 x 3072."""

from collections.abc import Iterable

from pipeline.curvature_sums import Metric, sums_of
from quantizers import quantizer_from_label
from quantizers.compiled import SEARCH_BYTES, is_there

MIB = 2**20
LOOPS_BYTES = 90 * MIB  # of numba, once something was compiled
PROCESS_BYTES = 330 * MIB  # of a worker process that has loaded torch and the quantizers
# in all, for each weight, and for each number of the larger curvature, whose factors are made in float64
COSTS = {"diagonal": (15 * MIB, 42, 0), "curvature": (60 * MIB, 69, 31)}
QUANTIZE = {"diagonal": (15 * MIB, 40, 0), "curvature": (60 * MIB, 85, 15)}
QUANTIZE_LOW_RANK = QUANTIZE | {"diagonal": (15 * MIB, 62, 0)}


def costs_bytes(shape: tuple[int, int], metric: Metric | None) -> int:
    """While the costs of a matrix [out, in] are estimated."""
    return _total(shape, metric, COSTS)


def quantize_bytes(shape: tuple[int, int], metric: Metric | None, labels: Iterable[str]) -> int:
    """While it is quantized by one of these quantizers, and the error measured; compiled loops included."""
    formats = [quantizer_from_label(label).format for label in labels]
    searches = is_there() and any("trellis" in form.kind for form in formats)
    measured = QUANTIZE_LOW_RANK if any(form.rank for form in formats) else QUANTIZE
    return _total(shape, metric, measured) + searches * (LOOPS_BYTES + SEARCH_BYTES)


def _total(shape: tuple[int, int], metric: Metric | None, measured: dict[str, tuple[int, int, int]]) -> int:
    sums = sums_of(metric).shapes(shape) if metric else {}
    side = max((size for name, (size, _) in sums.items() if name.endswith("_curvature")), default=0)
    overhead, a_weight, a_curvature = measured["curvature" if side else "diagonal"]
    return overhead + a_weight * shape[0] * shape[1] + a_curvature * side**2
