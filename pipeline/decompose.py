"""Plan -> quantized matrices: each weight W ~ Q + L1 L2 as planned, one at a time, one file each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.allocation import Plan, PlannedWeight
from pipeline.atomic import replace_file
from pipeline.errors import NonFiniteError
from pipeline.model import Matrix, Model
from pipeline.progress import SILENT, Progress
from pipeline.spread import Spread, over_cores
from pipeline.statistics import Statistics
from pipeline.working_memory import quantize_bytes
from quantizers import LayerStatistics, QuantizedTensor, quantizer_from_label, weighted_error

ERROR_DIGITS = 4  # later ones vary from run to run, for they add up the noise of float32 statistics


def decompose(
    model: Model,
    plan: Plan,
    statistics: Statistics | None,
    work: Path,
    *,
    device: str = "cpu",
    spread: Spread = over_cores,
    progress: Progress = SILENT,
) -> None:
    """Quantize every planned matrix into `work`/out/<module>.safetensors; finished ones are kept over kills.

    The bytes depend on the device: one code that is rounded the other way changes all that follow.

    The achieved weighted error goes into each file's metadata as `error`, rounded like the costs: the last bits of
    its sum are not the same from run to run.

    Raises:
        NonFiniteError: a weight or an error is not finite.
    """
    out = work / "out"
    out.mkdir(exist_ok=True)
    labels = {name: matrix.label for name, matrix in plan.matrices.items()}
    task = QuantizeMatrix(model, labels, statistics, out, device)
    for _ in progress.track(spread(task, model.matrices), "Decompose", total=len(model.matrices)):
        pass


@dataclass(frozen=True)
class QuantizeMatrix:
    """A pipeline.spread.MatrixTask: each matrix by the quantizer of its label, into folder/<module>.safetensors.

    Attributes:
        labels: module -> label, see quantizers/registered.py.
    """

    model: Model
    labels: dict[str, str]
    statistics: Statistics | None
    folder: Path
    device: str = "cpu"

    stage: ClassVar[str] = "decompose"
    has_small_operations: ClassVar[bool] = True

    def file(self, matrix: Matrix) -> Path:
        """See MatrixTask."""
        return self.folder / matrix_file(matrix.module)

    def make(self, matrix: Matrix) -> None:
        """See MatrixTask. Raises NonFiniteError."""
        if self.file(matrix).exists():
            return
        weight = self.model.weight(matrix).to(self.device)
        learnt = self.statistics.of(matrix).to(self.device) if self.statistics else None
        quantized = quantizer_from_label(self.labels[matrix.module]).quantize(weight, learnt)
        write_matrix(self.file(matrix), quantized, weight, learnt)

    def working_bytes(self, matrix: Matrix) -> int:
        """See MatrixTask."""
        metric = self.statistics.metric if self.statistics else None
        return quantize_bytes(matrix.shape, metric, [self.labels[matrix.module]])

    def settings(self, matrices: Sequence[Matrix]) -> dict[str, Any]:
        """See MatrixTask."""
        labels = {matrix.module: self.labels[matrix.module] for matrix in matrices}
        return {"labels": labels, "device": self.device}


def write_matrix(target: Path, quantized: QuantizedTensor, weight: Tensor, statistics: LayerStatistics | None) -> None:
    """Write `quantized` with its error as metadata; `weight` is what it stands for, float32 [out, in].

    Raises:
        NonFiniteError: the error is not finite.
    """
    error = weighted_error(weight - quantized.dequantize(), statistics)
    if not error < float("inf"):
        raise NonFiniteError(
            f"The error of the weight for {target.name} after quantization is {error}. The original is damaged."
        )
    tensors = {name: tensor.cpu().contiguous() for name, tensor in quantized.tensors().items()}
    replace_file(target, lambda path: save_file(tensors, path, metadata={"error": f"{error:.{ERROR_DIGITS}g}"}))


def matrix_file(module: str) -> str:
    """Name of the file that holds a module's quantized weight."""
    return f"{module}.safetensors"


def read_matrix(path: Path, plan: Plan, module: str) -> QuantizedTensor:
    """What `decompose` wrote for `module`."""
    return read_quantized(path, plan.packed[module])


def read_quantized(path: Path, planned: PlannedWeight) -> QuantizedTensor:
    """The same, of what is known to be planned."""
    with safe_open(path, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return QuantizedTensor.from_tensors(planned.format, planned.shape, planned.format.levels, tensors)


def read_error(path: Path) -> float:
    """The weighted error that `decompose` achieved."""
    with safe_open(path, framework="pt") as stored:
        return float(stored.metadata()["error"])
