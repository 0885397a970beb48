"""Token embeddings and output heads, packed where the recipe names a quantizer for them.

They are half of a small model, and take no part in the integer program: nothing here measures what their error costs.
Rounding is unweighted, and a table of any size is quantized a run of rows at a time (quantizers/rows.py).
"""

from pathlib import Path

from safetensors.torch import save_file

from pipeline.allocation import EMBEDDINGS_ADVICE, PlannedEmbedding
from pipeline.atomic import replace_file
from pipeline.costs import full_label
from pipeline.errors import RecipeError
from pipeline.model import Model
from pipeline.progress import Progress
from quantizers import BlockFormat, quantizer_from_label
from quantizers.rows import quantize_rows


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
            f"{model.spec} has no embeddings that can be packed: what stands there is no plain table of tokens, or is "
            "stored in several tensors. Leave --embeddings out."
        )
    return {
        embedding.module: PlannedEmbedding(full, embedding.shape, form.size_bits(embedding.shape))
        for embedding in model.embeddings
    }


def pack_embedding(model: Model, module: str, planned: PlannedEmbedding, target: Path, progress: Progress) -> None:
    """Write the quantized weight of `module` as the file `target`."""
    stored, form = model.tensor(f"{module}.weight"), planned.format
    assert isinstance(form, BlockFormat), "as planned_embeddings makes sure"
    progress.say(f"Packing {module}, {planned.shape[0]} x {planned.shape[1]}, as {planned.label}.")
    quantized = quantize_rows(lambda run: stored[run.start : run.stop], planned.shape, form)
    tensors = {name: tensor.contiguous() for name, tensor in quantized.tensors().items()}
    replace_file(target, lambda path: save_file(tensors, path))
