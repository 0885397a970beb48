"""The kinds of storage that kernels read, by their name in a checkpoint; all others stay on torch's path."""

from quantizers.block_format import BlockFormat
from quantizers.integer_format import IntegerFormat
from quantizers.kernels.abstract_weight import AbstractKernelWeight
from quantizers.kernels.block_weight import BlockWeight
from quantizers.kernels.trellis_weight import TrellisWeight
from quantizers.learned_format import LearnedFormat
from quantizers.trellis_format import TrellisFormat

KERNEL_WEIGHTS: dict[str, type[AbstractKernelWeight]] = {
    BlockFormat.kind: BlockWeight,
    LearnedFormat.kind: BlockWeight,
    IntegerFormat.kind: BlockWeight,
    TrellisFormat.kind: TrellisWeight,
}
