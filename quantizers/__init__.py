"""Tensors in, tensors out: quantizers, the low-rank correction around them, and the packed linear layer.

Importing this package also teaches transformers to load bitsmith checkpoints.
"""

from quantizers.abstract_block_format import AbstractBlockFormat
from quantizers.base import AbstractQuantizer
from quantizers.block_format import BlockFormat
from quantizers.estimate import ErrorEstimator
from quantizers.format import StorageFormat
from quantizers.integer import Integer
from quantizers.integer_format import IntegerFormat
from quantizers.kmeans import KMeans
from quantizers.lattice_coded import LatticeCoded
from quantizers.lattice_format import LatticeFormat
from quantizers.learned_format import LearnedFormat
from quantizers.linear import QuantizedLinear
from quantizers.lloyd_max import LloydMax
from quantizers.lq import LowRankPlus
from quantizers.normal_float import NormalFloat
from quantizers.quantized import LowRank, QuantizedTensor
from quantizers.registered import QUANTIZERS, quantizer_from_label
from quantizers.rotated import AbstractRotated
from quantizers.statistics import LayerStatistics, weighted_error
from quantizers.transformers_plugin import quantization_config
from quantizers.trellis_coded import TrellisCoded
from quantizers.trellis_format import TrellisFormat
from quantizers.variable_trellis import VariableTrellis
from quantizers.variable_trellis_format import VariableTrellisFormat

__all__ = [
    "QUANTIZERS",
    "AbstractBlockFormat",
    "AbstractQuantizer",
    "AbstractRotated",
    "BlockFormat",
    "ErrorEstimator",
    "Integer",
    "IntegerFormat",
    "KMeans",
    "LatticeCoded",
    "LatticeFormat",
    "LayerStatistics",
    "LearnedFormat",
    "LloydMax",
    "LowRank",
    "LowRankPlus",
    "NormalFloat",
    "QuantizedLinear",
    "QuantizedTensor",
    "StorageFormat",
    "TrellisCoded",
    "TrellisFormat",
    "VariableTrellis",
    "VariableTrellisFormat",
    "quantization_config",
    "quantizer_from_label",
    "weighted_error",
]
