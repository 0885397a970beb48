"""What packed matrices and embeddings take at most: known from the budget and what is on offer, before any plan."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from pipeline.allocation import Offered, PlannedEmbedding
from pipeline.budget import Budget
from pipeline.model import Model
from quantizers import quantizer_from_label


@dataclass(frozen=True)
class PackedSizes:
    """Of one run.

    Attributes:
        offered: parameter name -> labels on offer.
        embeddings: what may become of token embeddings and head.
    """

    model: Model
    budget: Budget
    offered: dict[str, list[str]]
    embeddings: Offered

    @property
    def embedding_sets(self) -> list[dict[str, PlannedEmbedding]]:
        """What embeddings and head may become, all of them alike, and leave room for: the largest first."""
        alike = zip(*self.embeddings.values(), strict=True)
        sets = [dict(zip(self.embeddings, each, strict=True)) for each in alike] or [{}]
        limit = self.budget.limit_bytes(self.model.size_bytes)
        return [each for each in sets if limit is None or self._kept_bytes(each) <= limit] or sets[-1:]

    @property
    def compressed_bytes(self) -> int:
        """Of the packed matrices at most, of what is on offer and under the budget."""
        return max(map(self.compressed_bytes_beside, self.embedding_sets))

    def compressed_bytes_beside(self, embeddings: Mapping[str, PlannedEmbedding]) -> int:
        """The same, where these are the embeddings."""
        if self.budget.bits_per_param is not None:
            return int(min(self._most_bits, self.budget.bits_per_param * self.model.num_matrix_params) / 8)
        limit = self.budget.limit_bytes(self.model.size_bytes) or 0
        return min(self._most_bits // 8, max(0, limit - self._kept_bytes(embeddings)))

    def saved_bytes(self, embeddings: Mapping[str, PlannedEmbedding]) -> int:
        """By which these are smaller than the original's."""
        return sum(
            self.model.tensors[f"{module}.weight"].size_bytes - each.size_bits // 8
            for module, each in embeddings.items()
        )

    def _kept_bytes(self, embeddings: Mapping[str, PlannedEmbedding]) -> int:
        """Of the folder without the matrices, about."""
        matrices = sum(self.model.tensors[matrix.name].size_bytes for matrix in self.model.matrices)
        return self.model.folder_bytes - matrices - self.saved_bytes(embeddings)

    @cached_property
    def _most_bits(self) -> int:
        """Of all matrices, each with the largest choice on offer."""
        labels = {label for labels in self.offered.values() for label in labels}
        formats = {label: quantizer_from_label(label).format for label in labels}
        kinds = Counter((matrix.shape, tuple(self.offered[matrix.name])) for matrix in self.model.matrices)
        return sum(
            number * max(formats[label].size_bits(shape) for label in labels)
            for (shape, labels), number in kinds.items()
        )
