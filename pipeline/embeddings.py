"""Token embeddings and output heads, which are half of a small model: what is on offer for them, and packing them.

Of a budget in bytes the integer program chooses, by costs that embedding_costs.py measures, unless the recipe names a
quantizer. A budget in bits per parameter counts the matrices alone, and leaves them as they are.

What gives the logits, a head or the embeddings that it shares, is rounded under the second moment of what the head
reads (head_curvature.py), with errors passed on from column to column; all else is rounded unweighted. A table of any
size is quantized a run of rows at a time (quantizers/rows.py).
"""

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.allocation import AS_STORED, EMBEDDINGS_ADVICE, Offered, PlannedEmbedding
from pipeline.atomic import replace_file
from pipeline.budget import Budget
from pipeline.costs import full_label
from pipeline.curvature_sums import sums_of
from pipeline.decompose import matrix_file
from pipeline.errors import RecipeError
from pipeline.model import Model
from pipeline.progress import SILENT, Progress
from pipeline.recipe import LEFT, Recipe
from quantizers import BlockFormat, quantizer_from_label
from quantizers.rows import WEIGHTS_AT_ONCE, quantize_rows

PACK_SECONDS = {False: 1.8e-7, True: 3.5e-7}  # for each weight, on one core; without and with a curvature
RUN_BYTES = {False: 40, True: 65}  # for each weight of a run, likewise
CURVATURE_BYTES = 31  # for each of its numbers, while it is factorized in float64
SCALE_BYTES = 32  # for each block, while scales are found and stored
CANDIDATES = ("nf8-g64-s8", "lloyd6-g64-s6", "lloyd5-g64-s6", "lloyd4-g32-s6", "lloyd3-g32-s6", "lloyd2-g32-s6")


def offered_embeddings(model: Model, recipe: Recipe) -> Offered:
    """What may become of each of the model's embeddings; of those that stay as they are, nothing.

    Raises:
        RecipeError: see `planned_embeddings`.
    """
    if recipe.embeddings is not None and recipe.embeddings != LEFT:
        return {module: (each,) for module, each in planned_embeddings(model, recipe.embeddings).items()}
    is_free = recipe.embeddings is None and Budget.parse(recipe.budget).bits_per_param is None
    if not is_free or recipe.sensitivity == "none" or not model.embeddings:
        return {}
    if not sums_of(recipe.sensitivity).in_nats:  # costs that do not compare with a divergence
        return {}
    packed = [planned_embeddings(model, label) for label in CANDIDATES]
    dense = {
        each.module: (each.shape, 8 * model.tensors[each.name].size_bytes)
        for each in model.embeddings
        if model.task.generates or not each.is_head  # which an encoder's features, that costs are measured by, know not
    }
    return {
        module: (PlannedEmbedding(AS_STORED, *facts, cost=0.0), *(each[module] for each in packed))
        for module, facts in dense.items()
    }


def planned_embeddings(model: Model, label: str) -> dict[str, PlannedEmbedding]:
    """All embeddings of `model` packed with one quantizer.

    Raises:
        RecipeError: there is no such quantizer, its rows cannot be read one by one, or the model has no embeddings that
            can be packed.
    """
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


def pack_embedding(
    model: Model,
    module: str,
    embedding: PlannedEmbedding,
    curvature: Tensor | None,
    work: Path,
    *,
    progress: Progress = SILENT,
) -> None:
    """Quantize it into `work`/out/<module>.safetensors.

    Args:
        curvature: for what gives the logits; see head_curvature.py.
    """
    (work / "out").mkdir(exist_ok=True)
    progress.say(f"Packing {module}, {embedding.shape[0]} x {embedding.shape[1]}, as {embedding.label}.")
    stored = model.tensor(f"{module}.weight")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the last bits of sums decide on codes
    try:
        quantized = quantize_rows(
            lambda run: stored[run.start : run.stop], embedding.shape, _format(embedding), curvature
        )
    finally:
        torch.set_num_threads(num_threads)
    tensors = {name: tensor.contiguous() for name, tensor in quantized.tensors().items()}
    replace_file(work / "out" / matrix_file(module), lambda path: save_file(tensors, path))


def packing_bytes(model: Model, offered: Offered, *, is_weighted: bool) -> int:
    """What `pack_embedding` takes at most, about: the original's table, its scales, the codes twice, and a run."""
    planned = [(module, embedding) for module, choices in offered.items() for embedding in packable(choices)]
    each = [
        model.tensors[f"{module}.weight"].size_bytes
        + SCALE_BYTES * math.prod(embedding.shape) // _format(embedding).block_size
        + embedding.size_bits // 4
        for module, embedding in planned
    ]
    widths = [embedding.shape[1] for _, embedding in planned]
    factors = CURVATURE_BYTES * max(widths) ** 2 if planned and is_weighted else 0
    return RUN_BYTES[is_weighted] * WEIGHTS_AT_ONCE + factors + max(each) if each else 0


def packable(choices: tuple[PlannedEmbedding, ...]) -> tuple[PlannedEmbedding, ...]:
    """Those that are packed."""
    return tuple(each for each in choices if each.label != AS_STORED)


def _format(planned: PlannedEmbedding) -> BlockFormat:
    assert isinstance(planned.format, BlockFormat), "planned_embeddings takes no others"
    return planned.format
