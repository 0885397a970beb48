"""Which stored tensor becomes which parameter.

Most checkpoints store a parameter under its own name; some leave out a prefix (GPT-2 without `transformer.`),
and some are renamed or merged on loading (experts). transformers' own loading rules decide here as well, so
that what we read is what `from_pretrained` would put there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Merged:
    """`target`: the parameter. `place`: which of an expert's tensors this one is, from above. `is_stacked`: the
    parameter is a stack of all experts', in each of which such tensors lie one above the other, and nothing else."""

    target: str
    place: int
    is_stacked: bool


@dataclass(frozen=True)
class StoredNames:
    """`parameters`: stored name -> parameter name, where one tensor becomes one parameter unchanged.
    `merged`: stored name -> the parameter that it is converted into together with others, and how.
    `produced`: name patterns of the parameters that those conversions yield."""

    parameters: dict[str, str]
    merged: dict[str, Merged]
    produced: tuple[str, ...]

    def knows(self, name: str) -> bool:
        """Whether the model has a use for a stored tensor."""
        return name in self.parameters or name in self.merged

    def produces(self, parameter: str) -> bool:
        """Whether a conversion that applies to this checkpoint may yield `parameter`."""
        return any(pattern in parameter for pattern in self.produced)


def match_names(model: "PreTrainedModel", stored: Iterable[str]) -> StoredNames:
    """Match the names in a checkpoint with those of `model` (on any device, meta included)."""
    known = model.state_dict()
    renamings, converters = _rules(model)
    parameters: dict[str, str] = {}
    merged: dict[str, Merged] = {}
    produced: set[str] = set()
    for name in stored:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = name, None
        if pattern is not None:
            converter = next(converter for converter in converters if pattern in converter.source_patterns)
            operations = [(type(each), getattr(each, "dim", None)) for each in converter.operations]
            is_stacked = operations in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
            merged[name] = Merged(renamed, converter.source_patterns.index(pattern), is_stacked)
            produced.update(target.strip("^$.") for target in converter.target_patterns)
        elif renamed in known:
            parameters[name] = renamed
    return StoredNames(parameters, merged, tuple(sorted(produced)))


def loaded_names(model: "PreTrainedModel", stored: Iterable[str]) -> set[str]:
    """What transformers calls these stored tensors once its rules are applied, whether or not `model` has such."""
    known = model.state_dict()
    renamings, converters = _rules(model)
    return {rename_source_key(name, renamings, converters, model.base_model_prefix, known)[0] for name in stored}


def _rules(model: "PreTrainedModel") -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """What transformers does to stored tensors of such a model."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]
