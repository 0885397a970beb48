"""QUANTIZERS: name -> class, and the short labels by which people name a quantizer on the command line.

    lloyd3              3 bits, everything else at its default
    nf4-g32-s4          4-bit NormalFloat, blocks (groups) of 32, 4-bit scales
    lloyd2-g64-s8-r16   with a low-rank part of rank 16

A new quantizer is one file and one row here. Packages of others add theirs through the entry point
group `bitsmith.quantizers` (name -> class).
"""

import re
from functools import cache
from importlib.metadata import entry_points

from quantizers.base import AbstractQuantizer
from quantizers.lloyd_max import LloydMax
from quantizers.lq import LowRankPlus
from quantizers.normal_float import NormalFloat

_LABEL = re.compile(r"(?P<name>[a-z]+)(?P<bits>\d+)(?:-g(?P<block>\d+))?(?:-s(?P<scale>\d+))?(?:-r(?P<rank>\d+))?")


@cache
def _all() -> dict[str, type]:
    ours: dict[str, type] = {"lloyd": LloydMax, "nf": NormalFloat}
    theirs = {entry.name: entry.load() for entry in entry_points(group="bitsmith.quantizers")}
    return theirs | ours


QUANTIZERS = _all()


def quantizer_from_label(label: str) -> AbstractQuantizer:
    """The quantizer that `label` names, e.g. "nf4" or "lloyd3-g32-s4-r8".

    Raises:
        ValueError: the label is malformed, or a setting is out of range.
    """
    match = _LABEL.fullmatch(label.strip().lower())
    if match is None or match["name"] not in QUANTIZERS:
        raise ValueError(
            f"{label!r} is not a quantizer; expected NAME and BITS, then optionally -gBLOCK, -sSCALEBITS and "
            f"-rRANK, as in lloyd3-g64-s8-r8, with NAME one of {', '.join(sorted(QUANTIZERS))}"
        )
    settings = {"block_size": match["block"], "scale_bits": match["scale"]}
    quantizer = QUANTIZERS[match["name"]](
        bits=int(match["bits"]), **{key: int(value) for key, value in settings.items() if value}
    )
    rank = int(match["rank"] or 0)
    return LowRankPlus(quantizer, rank) if rank else quantizer
