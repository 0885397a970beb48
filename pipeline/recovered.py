"""Quantized matrices -> recovered ones: the same files with other small tensors in them, and the same sizes.

    <module>.safetensors       of every matrix, as `decompose` writes it; codes unchanged
    kept.safetensors           trained norms and biases by parameter name, in the original's dtype; only after a gain
    recovery.json              recovery_report.py

Without a gain on the held-out windows, the matrices are those before.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.allocation import Plan
from pipeline.atomic import replace_file, write_json
from pipeline.costs import SIGNIFICANT_DIGITS
from pipeline.decompose import matrix_file, read_matrix, write_matrix
from pipeline.model import Model
from pipeline.packed import packed_model
from pipeline.progress import SILENT, Progress
from pipeline.recover import Recovered, recover
from pipeline.recovery_report import RecoveryReport
from pipeline.recovery_settings import RecoverySettings
from pipeline.safetensors_file import DTYPES
from pipeline.statistics import Statistics
from pipeline.teacher import TeacherWindows
from pipeline.trainable import GAIN
from quantizers.factors import INTO, OUT, FactorFormat, rounded
from quantizers.trainable import with_trained
from solvers.low_rank import Factors

KEPT_FILE = "kept.safetensors"
REPORT_FILE = "recovery.json"


def recover_matrices(
    model: Model,
    plan: Plan,
    statistics: Statistics | None,
    matrix_path: Callable[[str], Path],
    teacher: TeacherWindows,
    settings: RecoverySettings,
    work: Path,
    *,
    device: str,
    progress: Progress = SILENT,
) -> None:
    """Train what `settings` name and leave the files above in `work`/out; goes on from what a killed call saved.

    Takes the memory of the packed model and a dense copy of each quantized part, since dequantizing a trellis for every
    product would take most of the time. The error of each changed matrix is measured anew.

    Args:
        matrix_path: module name -> file that `decompose` wrote for it.
        teacher: see `recover`.
    Raises:
        CalibrationError, NonFiniteError, RecipeChangedError, RecipeError: see `recover`.
    """
    found = recover(
        packed_model(model, plan, matrix_path).to(torch.device(device)),  # type: ignore[arg-type]
        teacher,
        settings,
        work,
        as_stored=StoredValues(model, plan),
        dense_bytes=4 * model.num_matrix_params,
        progress=progress,
    )
    out = work / "out"
    out.mkdir(exist_ok=True)
    for matrix in progress.track(model.matrices, "Recovered matrices", total=len(model.matrices)):
        source, target = matrix_path(matrix.module), out / matrix_file(matrix.module)
        gain, factors = _trained(found.values, matrix.module)
        if gain is None and factors is None:
            replace_file(target, partial(shutil.copyfile, source))
            continue
        quantized = with_trained(read_matrix(source, plan, matrix.module), gain=gain, factors=factors)
        write_matrix(target, quantized, model.weight(matrix), statistics.of(matrix) if statistics else None)
    for module in plan.embeddings:
        replace_file(out / matrix_file(module), partial(shutil.copyfile, matrix_path(module)))
    if kept := _kept(model, found.values):
        replace_file(out / KEPT_FILE, lambda path: save_file(kept, path))
    write_json(out / REPORT_FILE, _report(found, settings, len(teacher)).to_json())


class StoredValues:
    """Float32 values of trained tensors by name -> their values once they have been stored and read again."""

    def __init__(self, model: Model, plan: Plan) -> None:
        self._model, self._plan = model, plan

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors go through their formats, a gain stays in float32 like the scales, all else takes its own dtype.

        Components of one length go together: the rounding is many small operations, and there are many factors.
        """
        stored: dict[str, Tensor] = {}
        together: dict[tuple[int, int], dict[str, Tensor]] = defaultdict(dict)
        for name, value in values.items():
            module, _, kind = name.rpartition(".")
            if kind in (OUT, INTO):
                components = value.T if kind == OUT else value  # [rank, out] or [rank, in]
                together[self._plan.matrices[module].format.factor_bits, components.shape[1]][name] = components
            else:
                stored[name] = value if kind == GAIN else value.to(_stored_dtype(self._model, name))
        for (bits, _), group in together.items():
            parts = rounded(torch.cat(list(group.values())), FactorFormat(bits)).split([len(c) for c in group.values()])
            for name, part in zip(group, parts, strict=True):
                stored[name] = part.T if name.endswith(f".{OUT}") else part
        return stored


def read_kept(path: Path) -> dict[str, Tensor]:
    """Trained norms and biases by parameter name, as `recover_matrices` wrote them."""
    return load_file(path)


def read_report(path: Path) -> RecoveryReport:
    """The figures that `recover_matrices` wrote."""
    return RecoveryReport.from_json(json.loads(path.read_text()))


def _trained(values: dict[str, Tensor], module: str) -> tuple[Tensor | None, Factors | None]:
    gain, out, into = (values.get(f"{module}.{kind}") for kind in (GAIN, OUT, INTO))
    factors = None if out is None or into is None else Factors(out.cpu(), into.cpu())
    return None if gain is None else gain.cpu(), factors


def _kept(model: Model, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to no packed weight, as it is stored."""
    names = [name for name in values if name.rpartition(".")[2] not in (GAIN, OUT, INTO)]
    return {name: values[name].to(_stored_dtype(model, name)).cpu().contiguous() for name in names}


def _stored_dtype(model: Model, name: str) -> torch.dtype:
    return DTYPES[model.tensors[name].dtype]


def _report(found: Recovered, settings: RecoverySettings, num_windows: int) -> RecoveryReport:
    held_out = settings.num_held_out(num_windows)
    checks = tuple((check.step, _rounded(check.held_out_loss)) for check in found.checks)
    return RecoveryReport(
        train=settings.train,
        steps=found.steps,
        num_train_windows=num_windows - held_out,
        num_held_out_windows=held_out,
        has_gained=bool(found.values),
        start_kl=checks[0][1],
        best_kl=_rounded(found.best_kl),
        checks=checks,
    )


def _rounded(value: float) -> float:
    """Like the errors of matrices: the last bits of a sum are not the same from run to run."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
