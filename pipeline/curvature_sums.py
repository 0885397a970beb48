"""What calibration sums up over windows, for each metric that the error can be weighted with.

With x [tokens, in] a layer's input, g [tokens, out] the gradient of the window's summed loss with respect to the
layer's output, and G = g^T x the weight's gradient:

    fisher     F   = sum over windows of G * G                 true labels (LQ-LoRA, arXiv:2311.12023)
    factored   F's row and column sums, from which comes its best rank-one estimate    (LQ-LoRA's reduction of F)
    input      H_I = sum over tokens of x x^T                  (GPTQ, arXiv:2210.17323)
    kl         the same H_I, times what disturbing the matrix does to the model's output: no gradients
    guided     H_I = sum over tokens of |g|^2 x x^T / out      (GuidedQuant, arXiv:2505.07004, in one group of outputs)
    kronecker  H_I = sum over tokens of |g|^2 x x^T,
               H_O = sum over tokens of |x|^2 g g^T            (the same on both sides)
    sequence   H_I = sum over windows of G^T G,
               H_O = sum over windows of G G^T                 (YAQA's sketch B, arXiv:2505.22988)

The last three metrics take labels drawn from the model, so that they estimate the curvature of the divergence from the
original itself. `guided` takes all outputs of a matrix for alike; the last two are the first power iteration towards
the best Kronecker factors of the Fisher information. A window is one sample for `sequence` and hundreds for the others,
which neglect how tokens of a window act together.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantizers import LayerStatistics

Metric = Literal["fisher", "factored", "input", "kl", "guided", "kronecker", "sequence"]
SHRINKAGE = 0.3  # of what is beside the diagonal of a factor


class Sums(ABC):
    """One metric: which sums it keeps of a matrix, how a window adds to them, and what they mean in the end.

    Attributes:
        title: of the work, for a progress bar.
        labels_are_drawn: labels come from the model's own prediction instead of from the text.
        of_input_alone: matrices that read the same input share the sums.
        scaled_by_divergence: what they are worth is measured forward, by disturbing each matrix (divergence_scale.py).
    """

    title: ClassVar[str]
    labels_are_drawn: ClassVar[bool] = False
    of_input_alone: ClassVar[bool] = False
    scaled_by_divergence: ClassVar[bool] = False
    forms_gradients: ClassVar[bool] = False  # G [out, in], while a window is added
    in_nats: ClassVar[bool] = True  # what errors are weighted to: the divergence that they cause, a token

    @abstractmethod
    def shapes(self, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """Name and shape of each sum, for a matrix of this shape (out, in)."""

    @abstractmethod
    def add(self, held: dict[str, Tensor], x: Tensor, g: Tensor) -> None:
        """Add one window's x [tokens, in] and g [tokens, out]."""

    @abstractmethod
    def level(self, held: dict[str, Tensor], shape: tuple[int, int]) -> float:
        """Of a matrix's sums: what errors cost of which none counts more than another, on average over its weights."""

    @abstractmethod
    def even(self, level: float, shape: tuple[int, int]) -> dict[str, Tensor]:
        """Sums of that level in which all errors count alike."""

    @abstractmethod
    def statistics(self, held: dict[str, Tensor], num_tokens: int) -> LayerStatistics:
        """The metric, scaled so that a weighted error estimates the divergence from the original in nats a token."""


class FisherSums(Sums):
    """See the module."""

    title = "Fisher information"
    forms_gradients = True

    def shapes(self, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """See Sums."""
        return {"fisher_diag": shape}

    def add(self, held: dict[str, Tensor], x: Tensor, g: Tensor) -> None:
        """See Sums."""
        G = g.T @ x
        held["fisher_diag"].addcmul_(G, G)

    def level(self, held: dict[str, Tensor], shape: tuple[int, int]) -> float:
        """See Sums."""
        return float(held["fisher_diag"].double().mean())

    def even(self, level: float, shape: tuple[int, int]) -> dict[str, Tensor]:
        """See Sums."""
        return {"fisher_diag": torch.full(shape, level)}

    def statistics(self, held: dict[str, Tensor], num_tokens: int) -> LayerStatistics:
        """See Sums: the second-order term is half of the curvature."""
        return LayerStatistics(fisher_diag=held["fisher_diag"] / (2 * num_tokens))


class FactoredSums(Sums):
    """See the module. Of a matrix, as many numbers as it has rows and columns: gigabytes less for a large model."""

    title = "Fisher information of rows and columns"
    forms_gradients = True

    def shapes(self, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """See Sums."""
        return {"fisher_rows": (shape[0], 1), "fisher_columns": (1, shape[1])}

    def add(self, held: dict[str, Tensor], x: Tensor, g: Tensor) -> None:
        """See Sums."""
        F = (g.T @ x).square_()
        held["fisher_rows"].add_(F.sum(dim=1, keepdim=True))
        held["fisher_columns"].add_(F.sum(dim=0, keepdim=True))

    def level(self, held: dict[str, Tensor], shape: tuple[int, int]) -> float:
        """See Sums."""
        return float(held["fisher_rows"].double().sum()) / (shape[0] * shape[1])

    def even(self, level: float, shape: tuple[int, int]) -> dict[str, Tensor]:
        """See Sums."""
        (rows, columns), shapes = shape, self.shapes(shape)
        return {
            "fisher_rows": torch.full(shapes["fisher_rows"], level * columns),
            "fisher_columns": torch.full(shapes["fisher_columns"], level * rows),
        }

    def statistics(self, held: dict[str, Tensor], num_tokens: int) -> LayerStatistics:
        """See Sums: the matrix of rank one that has these sums of rows and columns."""
        rows, columns = held["fisher_rows"], held["fisher_columns"]
        total = float(rows.double().sum())
        return LayerStatistics(fisher_diag=rows / total * columns / (2 * num_tokens) if total > 0 else rows * columns)


class InputSums(Sums):
    """See the module. Its errors are squared output errors a token, not nats."""

    title = "Second moments of the inputs"
    of_input_alone = True
    in_nats = False

    def shapes(self, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """See Sums."""
        return {"input_curvature": (shape[1], shape[1])}

    def add(self, held: dict[str, Tensor], x: Tensor, g: Tensor) -> None:
        """See Sums."""
        held["input_curvature"].addmm_(x.T, x)

    def level(self, held: dict[str, Tensor], shape: tuple[int, int]) -> float:
        """See Sums."""
        return float(held["input_curvature"].double().trace()) / shape[1]

    def even(self, level: float, shape: tuple[int, int]) -> dict[str, Tensor]:
        """See Sums."""
        return {"input_curvature": level * torch.eye(shape[1])}

    def statistics(self, held: dict[str, Tensor], num_tokens: int) -> LayerStatistics:
        """See Sums."""
        return LayerStatistics(input_curvature=held["input_curvature"] / num_tokens)


class DivergenceSums(InputSums):
    """See the module. With the scale that is measured for each matrix, its errors are in nats too."""

    scaled_by_divergence = True
    in_nats = True


class GuidedSums(InputSums):
    """See the module. Half of the numbers of `kronecker` where a matrix is square, and half of the work."""

    title = "Second moments of the inputs, by gradients"
    labels_are_drawn = True
    of_input_alone = False
    in_nats = True

    def add(self, held: dict[str, Tensor], x: Tensor, g: Tensor) -> None:
        """See Sums. A row's own curvature would weight with that row's gradient; this is their mean over the rows."""
        weighted = x * (g.norm(dim=1, keepdim=True) / g.shape[1] ** 0.5)
        held["input_curvature"].addmm_(weighted.T, weighted)

    def statistics(self, held: dict[str, Tensor], num_tokens: int) -> LayerStatistics:
        """See Sums."""
        return LayerStatistics(input_curvature=shrunk(held["input_curvature"]) / (2 * num_tokens))


class KroneckerSums(Sums):
    """See the module."""

    title = "Curvature of the loss"
    labels_are_drawn = True

    def shapes(self, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """See Sums."""
        return {"input_curvature": (shape[1], shape[1]), "output_curvature": (shape[0], shape[0])}

    def add(self, held: dict[str, Tensor], x: Tensor, g: Tensor) -> None:
        """See Sums."""
        weighted_x = x * g.norm(dim=1, keepdim=True)
        weighted_g = g * x.norm(dim=1, keepdim=True)
        held["input_curvature"].addmm_(weighted_x.T, weighted_x)
        held["output_curvature"].addmm_(weighted_g.T, weighted_g)

    def level(self, held: dict[str, Tensor], shape: tuple[int, int]) -> float:
        """See Sums: both traces are that of the whole curvature."""
        return float(held["input_curvature"].double().trace()) / (shape[0] * shape[1])

    def even(self, level: float, shape: tuple[int, int]) -> dict[str, Tensor]:
        """See Sums."""
        rows, columns = shape
        return {
            "input_curvature": level * rows * torch.eye(columns),
            "output_curvature": level * columns * torch.eye(rows),
        }

    def statistics(self, held: dict[str, Tensor], num_tokens: int) -> LayerStatistics:
        """See Sums: both sums have the trace of the whole curvature, which may count only once."""
        inputs, outputs = shrunk(held["input_curvature"]), shrunk(held["output_curvature"])
        trace = float(outputs.double().trace())
        return LayerStatistics(
            input_curvature=inputs / (2 * num_tokens), output_curvature=outputs / trace if trace > 0 else outputs
        )


class SequenceSums(KroneckerSums):
    """See the module."""

    title = "Curvature of the loss, by windows"
    forms_gradients = True

    def add(self, held: dict[str, Tensor], x: Tensor, g: Tensor) -> None:
        """See Sums."""
        G = g.T @ x
        held["input_curvature"].addmm_(G.T, G)
        held["output_curvature"].addmm_(G, G.T)


def shrunk(curvature: Tensor) -> Tensor:
    """(1 - SHRINKAGE) H + SHRINKAGE diag(H), of H [n, n] in its dtype: the same diagonal, and less beside it.

    What is beside the diagonal is an estimate from a few heavy tokens, and true only as far as the curvature is a
    product of two factors. A rounder that feeds errors back makes the most of what is wrong with it. As Ledoit and
    Wolf (2004) shrink a covariance; the share is measured (BENCHMARKS.md), as theirs would know nothing of the product.
    """
    found = (1 - SHRINKAGE) * curvature
    found.diagonal().copy_(curvature.diagonal())
    return found


_SUMS: dict[Metric, Sums] = {
    "fisher": FisherSums(),
    "factored": FactoredSums(),
    "input": InputSums(),
    "kl": DivergenceSums(),
    "guided": GuidedSums(),
    "kronecker": KroneckerSums(),
    "sequence": SequenceSums(),
}


def sums_of(metric: Metric) -> Sums:
    """The sums that a metric is made of."""
    return _SUMS[metric]
