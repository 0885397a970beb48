"""Token embeddings and output heads, packed where the recipe names a quantizer for them.

They are half of a small model, and take no part in the integer program: nothing here measures what their error costs.
What gives the logits, a head or the embeddings that it shares, is rounded under the second moment of what the head
reads (head_curvature.py), with errors passed on from column to column; all else is rounded unweighted. A table of any
size is quantized a run of rows at a time (quantizers/rows.py).
"""

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.allocation import EMBEDDINGS_ADVICE, PlannedEmbedding
from pipeline.atomic import replace_file
from pipeline.costs import full_label
from pipeline.decompose import matrix_file
from pipeline.errors import RecipeError
from pipeline.model import Model
from pipeline.progress import SILENT, Progress
from quantizers import BlockFormat, quantizer_from_label
from quantizers.rows import WEIGHTS_AT_ONCE, quantize_rows

PACK_SECONDS = {False: 1.8e-7, True: 3.5e-7}  # for each weight, on one core; without and with a curvature
RUN_BYTES = {False: 40, True: 65}  # for each weight of a run, likewise
CURVATURE_BYTES = 31  # for each of its numbers, while it is factorized in float64
SCALE_BYTES = 32  # for each block, while scales are found and stored


def planned_embeddings(model: Model, label: str | None) -> dict[str, PlannedEmbedding]:
    """All embeddings of `model` packed with one quantizer; none if `label` is None.

    Raises:
        RecipeError: there is no such quantizer, its rows cannot be read one by one, or the model has no embeddings that
            can be packed.
    """
    if label is None:
        return {}
    full = full_label(label)
    form = quantizer_from_label(full).format
    if not isinstance(form, BlockFormat) or form.rank:
        raise RecipeError(
            f"Embeddings cannot be packed with {label}: tokens are looked up row by row, so it must be a quantizer of "
            f"blocks (lloyd or nf) without a low-rank part. Give {EMBEDDINGS_ADVICE}, for example."
        )
    if not model.embeddings:
        raise RecipeError(
            f"{model.spec} has no embeddings that can be packed: what stands there does more than to look tokens up, "
            "or the files have it in several tensors, under the name of what shares it, or once more as a head of its "
            "own. Leave --embeddings out."
        )
    return {
        embedding.module: PlannedEmbedding(full, embedding.shape, form.size_bits(embedding.shape))
        for embedding in model.embeddings
    }


def gives_logits(model: Model, module: str) -> bool:
    """Does an output head multiply with this embedding of `model`?"""
    return any(each.gives_logits for each in model.embeddings if each.module == module)


def pack_embeddings(
    model: Model,
    planned: dict[str, PlannedEmbedding],
    curvature: Tensor | None,
    work: Path,
    *,
    progress: Progress = SILENT,
) -> None:
    """Quantize each into `work`/out/<module>.safetensors; finished ones are kept over kills.

    Args:
        curvature: for what gives the logits; see head_curvature.py.
    """
    out = work / "out"
    out.mkdir(exist_ok=True)

    def pack(module: str) -> None:
        embedding, target = planned[module], out / matrix_file(module)
        if target.exists():
            return
        progress.say(f"Packing {module}, {embedding.shape[0]} x {embedding.shape[1]}, as {embedding.label}.")
        stored, metric = model.tensor(f"{module}.weight"), curvature if gives_logits(model, module) else None
        quantized = quantize_rows(lambda run: stored[run.start : run.stop], embedding.shape, _format(embedding), metric)
        tensors = {name: tensor.contiguous() for name, tensor in quantized.tensors().items()}
        replace_file(target, lambda path: save_file(tensors, path))

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the last bits of sums decide on codes
    try:
        for module in planned:
            pack(module)
    finally:
        torch.set_num_threads(num_threads)


def packing_bytes(model: Model, planned: dict[str, PlannedEmbedding], *, is_weighted: bool) -> int:
    """What `pack_embeddings` takes at most, about: the original's table, its scales, the codes twice, and a run."""
    each = [
        model.tensors[f"{module}.weight"].size_bytes
        + SCALE_BYTES * math.prod(embedding.shape) // _format(embedding).block_size
        + embedding.size_bits // 4
        for module, embedding in planned.items()
    ]
    widths = [embedding.shape[1] for embedding in planned.values()]
    factors = CURVATURE_BYTES * max(widths) ** 2 if planned and is_weighted else 0
    return RUN_BYTES[is_weighted] * WEIGHTS_AT_ONCE + factors + max(each) if each else 0


def _format(planned: PlannedEmbedding) -> BlockFormat:
    assert isinstance(planned.format, BlockFormat), "planned_embeddings takes no others"
    return planned.format
