"""Say of which matrices the curvature is singular, and what becomes of them."""

import math
from collections.abc import Callable, Iterable

from pipeline.model import Matrix
from quantizers import LayerStatistics
from quantizers.curvature import DAMPING, Triangular, factorize

Say = Callable[[str], None]


def say_if_degraded(name: str, side: str, factor: Triangular, say: Say) -> None:
    """Tell if `factor` has more than the usual damping.

    Args:
        name: of the matrix.
        side: "inputs" or "outputs".
    """
    if math.isinf(factor.damping):
        say(
            f"{name}: the calibration text tells nothing about its {side}, so their errors all count alike and none "
            "makes up for another. More or other text may help."
        )
    elif factor.damping > DAMPING:
        say(
            f"{name}: the curvature of its {side} is nearly singular; {factor.damping:g} of its mean was added to the "
            "diagonal."
        )


def say_all_degraded(matrices: Iterable[Matrix], statistics_of: Callable[[Matrix], LayerStatistics], say: Say) -> None:
    """`say_if_degraded` for both sides of all matrices with curvatures."""
    for matrix in matrices:
        learnt = statistics_of(matrix)
        for side, curvature in (("inputs", learnt.input_curvature), ("outputs", learnt.output_curvature)):
            if curvature is not None:
                say_if_degraded(matrix.name, side, factorize(curvature), say)
