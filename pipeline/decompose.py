"""Plan -> quantized matrices: each weight W ~ Q + L1 L2 as planned, one at a time, one file each."""

from functools import partial
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.allocation import Plan
from pipeline.atomic import replace_file
from pipeline.errors import NonFiniteError
from pipeline.model import Matrix, Model
from pipeline.parallel import map_in_order, map_in_processes
from pipeline.progress import SILENT, Progress
from pipeline.statistics import Statistics
from quantizers import LayerStatistics, QuantizedTensor, quantizer_from_label, weighted_error

ERROR_DIGITS = 4  # later ones vary from run to run, for they add up the noise of float32 statistics
PARAMS_FOR_PROCESSES = 2**23  # below, starting processes takes longer than the work


def decompose(
    model: Model,
    plan: Plan,
    statistics: Statistics | None,
    work: Path,
    *,
    progress: Progress = SILENT,
) -> None:
    """Quantize every planned matrix into `work`/out/<module>.safetensors; finished ones are kept over kills.

    Always on the CPU's cores, so that the bytes do not depend on the device: error feedback is a chain of small
    operations, for which a core takes less time than a large GPU (LOG.md).

    The achieved weighted error goes into each file's metadata as `error`, rounded like the costs: the last bits of
    its sum are not the same from run to run.

    Raises:
        NonFiniteError: a weight or an error is not finite.
    """
    out = work / "out"
    out.mkdir(exist_ok=True)
    quantize = partial(_quantize, model, plan, statistics, out)
    spread = map_in_processes if model.num_matrix_params >= PARAMS_FOR_PROCESSES else map_in_order
    for _ in progress.track(spread(quantize, model.matrices), "Decompose", total=len(model.matrices)):
        pass


def _quantize(model: Model, plan: Plan, statistics: Statistics | None, out: Path, matrix: Matrix) -> None:
    target = out / matrix_file(matrix.module)
    if target.exists():
        return
    weight = model.weight(matrix)
    learnt = statistics.of(matrix) if statistics else None
    quantized = quantizer_from_label(plan.matrices[matrix.module].label).quantize(weight, learnt)
    write_matrix(target, quantized, weight, learnt)


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
    planned = plan.matrices[module]
    with safe_open(path, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return QuantizedTensor.from_tensors(planned.format, planned.shape, planned.format.levels, tensors)


def read_error(path: Path) -> float:
    """The weighted error that `decompose` achieved."""
    with safe_open(path, framework="pt") as stored:
        return float(stored.metadata()["error"])
