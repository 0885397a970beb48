"""docs/architectures.md, from the tests' tiny models: `python -m tests.architecture_table > docs/architectures.md`."""

import tempfile
from pathlib import Path

from pipeline.layered import NotLayeredError, blocks_of
from pipeline.model import Model, open_model
from tests.architectures import CAUSAL, build_causal
from tests.models import save_model

HEAD = """# Architectures

Each row is a tiny random model of transformers' own class, which the tests compress, load anew, and compare with what
was planned (`tests/pipeline/test_architectures.py`). Other models that read text are taken apart alike:
every linear layer that text calls in the repeated blocks is a matrix; what is for images stays as it is.
`bitsmith inspect MODEL` lists what is left, and why. A model that transformers lacks and that brings its own code is
opened with `--trust-remote-code` (`tests/pipeline/test_own_code.py`).

"In memory" is what statistics, evaluation and audit hold of the original's weights in float32, beside embeddings, norms
and head.

| `model_type` | class | compressed, in each block | left as they are in the blocks | in memory |
| --- | --- | --- | --- | --- |
"""
FOR_IMAGES = ("vision_tower", "visual", "multi_modal_projector")
PLAIN = ("norm", "bias", "embedding", "output head", "tied to")  # left in every model, and no matrix


def row(model: Model) -> str:
    """One line of the table."""
    kinds = dict.fromkeys(
        f"experts.*.{matrix.kind}" if ".experts." in matrix.module else matrix.kind for matrix in model.matrices
    )
    left: dict[str, str] = {}
    for entry in model.skipped:
        if not entry.reason.startswith(PLAIN):
            left.setdefault(_place(entry.name), entry.reason)
    try:
        blocks_of(model)
        held = "one block"
    except NotLayeredError:
        held = "all"
    architecture = (model.config.architectures or ["?"])[0]
    cells = (
        f"`{model.config.model_type}`",
        architecture,
        ", ".join(kinds),
        "; ".join(f"{place} ({reason})" for place, reason in left.items()) or "-",
        held,
    )
    return f"| {' | '.join(cells)} |"


def _place(name: str) -> str:
    """In a block of text; or which part of the model it belongs to."""
    return next((part for part in FOR_IMAGES if part in name), _in_block(name))


def _in_block(name: str) -> str:
    before, _, within = name.partition(".layers.")
    return within.partition(".")[2] or before


def main() -> None:
    """Print the page."""
    print(HEAD, end="")
    for model_type in CAUSAL:
        with tempfile.TemporaryDirectory() as folder:
            print(row(open_model(str(save_model(build_causal(model_type), Path(folder) / "model")))))


if __name__ == "__main__":
    main()
