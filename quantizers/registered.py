"""QUANTIZERS: name -> class, and the short labels by which people name a quantizer on the command line.

    lloyd3                 3 bits, everything else at its default
    nf4-g32-s4             4-bit NormalFloat, blocks (groups) of 32, 4-bit scales
    int3-g64-s4            3-bit integers with zero-points
    kmeans3-g64-s4         3 bits, levels of each matrix's own
    trellis2-l10           2-bit trellis with states of 10 bits
    vtrellis2.25           2.25 bits on average, 1 to 5 by the tile
    e8p2                   2 bits by points of the E8 lattice
    lloyd2-g64-s8-r16-f8   with a low-rank part of rank 16, its factors in 8 bits

A new quantizer is one file and one row here. Packages of others add theirs through the entry point
group `bitsmith.quantizers` (name -> class).
"""

import re
from dataclasses import fields
from functools import cache
from importlib.metadata import entry_points

from quantizers.base import AbstractQuantizer
from quantizers.integer import Integer
from quantizers.kmeans import KMeans
from quantizers.lattice_coded import LatticeCoded
from quantizers.lloyd_max import LloydMax
from quantizers.lq import LowRankPlus
from quantizers.normal_float import NormalFloat
from quantizers.trellis_coded import TrellisCoded
from quantizers.variable_trellis import VariableTrellis

_SETTINGS = {"g": "block_size", "s": "scale_bits", "l": "state_bits", "r": "rank", "f": "factor_bits"}
_LABEL = re.compile(
    r"(?P<name>[a-z][a-z0-9]*?)(?P<bits>\d+(?:\.\d+)?)"
    + "".join(rf"(?:-{letter}(?P<{letter}>\d+))?" for letter in _SETTINGS)
)


@cache
def _all() -> dict[str, type]:
    ours: dict[str, type] = {
        "e8p": LatticeCoded,
        "int": Integer,
        "kmeans": KMeans,
        "lloyd": LloydMax,
        "nf": NormalFloat,
        "trellis": TrellisCoded,
        "vtrellis": VariableTrellis,
    }
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
            f"{label!r} is not a quantizer; expected NAME and BITS, then optionally -gBLOCK, -sSCALEBITS, -lSTATEBITS, "
            f"-rRANK and -fFACTORBITS, as in lloyd3-g64-s8-r8, with NAME one of {', '.join(sorted(QUANTIZERS))}"
        )
    settings = {name: int(match[letter]) for letter, name in _SETTINGS.items() if match[letter]}
    rank, factor_bits = settings.pop("rank", 0), settings.pop("factor_bits", 16)
    quantizer_class = QUANTIZERS[match["name"]]
    number = next((each.type for each in fields(quantizer_class) if each.name == "bits"), int)
    if number is not float and "." in match["bits"]:
        raise ValueError(f"{label!r} has {match['bits']} bits, but {match['name']} takes whole numbers of them only")
    try:
        quantizer = quantizer_class(bits=float(match["bits"]) if number is float else int(match["bits"]), **settings)
    except TypeError:
        raise ValueError(f"{label!r} has a setting that {match['name']} does not know") from None
    return LowRankPlus(quantizer, rank, factor_bits) if rank else quantizer
