"""Every kind of storage, by the name that stands in a checkpoint."""

from typing import Any

from quantizers.block_format import BlockFormat
from quantizers.factors import FACTOR_NAMES
from quantizers.format import StorageFormat
from quantizers.integer_format import IntegerFormat
from quantizers.lattice_format import LatticeFormat
from quantizers.learned_format import LearnedFormat
from quantizers.trellis_format import TrellisFormat
from quantizers.variable_trellis_format import VariableTrellisFormat

FORMATS: dict[str, type[StorageFormat]] = {
    form.kind: form
    for form in (BlockFormat, IntegerFormat, LearnedFormat, TrellisFormat, VariableTrellisFormat, LatticeFormat)
}
PACKED_NAMES = {*FACTOR_NAMES, *(name for form in FORMATS.values() for name in form.plain_names)}


def format_from_json(entry: dict[str, Any]) -> StorageFormat:
    """Undo `StorageFormat.to_json`; an entry of format version 1 has no kind and is a block format.

    Raises:
        ValueError: there is no such kind, or a setting is out of range.
        TypeError: a setting is missing or unknown.
    """
    settings = dict(entry)
    kind = settings.pop("kind", BlockFormat.kind)
    if kind not in FORMATS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(sorted(FORMATS))}")
    return FORMATS[kind](**settings)
