"""Will an evaluation measure what gates ask for? That depends on the kind of the model (pipeline/task.py).

A gate on a figure that there never is refuses every version, each after a whole compression.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import GateError
from pipeline.home import expanded
from pipeline.sources import DEMO

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

OF_PREDICTIONS, OF_FEATURES = ("perplexity", "perplexity_ratio", "top1"), ("cosine",)


def check_measured(gates: Iterable[str], recipe: "Recipe", folder: Path) -> None:
    """Compare the gates' figures with the kind of the recipe's model.

    Args:
        folder: has the model's config.json.
    Raises:
        GateError: a gate is malformed, or asks for a figure that a model of this kind does not have.
        ModelError: see pipeline.model_config.read_config.
    """
    from pipeline.gate import Requirement

    asked = {gate: Requirement.parse(gate).figure for gate in gates}
    if not set(asked.values()) & {*OF_PREDICTIONS, *OF_FEATURES}:
        return
    predicts = _predicts(recipe, folder)
    missing, instead = (OF_FEATURES, OF_PREDICTIONS) if predicts else (OF_PREDICTIONS, OF_FEATURES)
    for gate, figure in asked.items():
        if figure in missing:
            raise GateError(
                f"The gate {gate} asks for {figure}, which {recipe.model} does not have: "
                f"{'it predicts tokens' if predicts else 'it is an encoder and predicts no tokens'}. Ask for "
                f"{', '.join(instead)}, kld or kld_p99."
            )


def check_measured_here(gates: Iterable[str], recipe: "Recipe") -> None:
    """The same as far as it can be told without the Hub, and without running a model's own code."""
    folder = expanded(recipe.model)
    is_here = (folder / "config.json").is_file() and not recipe.trust_remote_code
    if is_here or _is_made_from_gguf(recipe):
        check_measured(gates, recipe, folder)


def _predicts(recipe: "Recipe", folder: Path) -> bool:
    if _is_made_from_gguf(recipe):
        return True
    from pipeline.model_config import read_config
    from pipeline.task import task_of

    return task_of(read_config(folder, trust_remote_code=recipe.trust_remote_code)).generates


def _is_made_from_gguf(recipe: "Recipe") -> bool:
    return recipe.model == DEMO or recipe.model.endswith(".gguf")
