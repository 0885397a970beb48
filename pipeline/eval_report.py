"""What an evaluation found: quality of a compressed model, and its distance from the original.

Plain numbers and no tensors, so that reports, cards and the registry read it without torch.
No time and no host inside: equal work gives an equal report.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipeline.errors import CheckpointError, NonFiniteError

_OF_PREDICTIONS = {"perplexity", "base_perplexity", "top1_agreement"}
_OF_FEATURES = {"cosine_similarity"}


@dataclass(frozen=True)
class Estimate:
    """A mean over the scored tokens, and how far it may be off.

    `standard_error` is None where one window alone cannot tell.
    """

    mean: float
    standard_error: float | None

    @classmethod
    def of_windows(cls, window_means: Sequence[float]) -> "Estimate":
        """The mean of equally long windows, with the cluster-robust standard error.

        Tokens of one window depend on each other, so the window is the unit of sampling:
        std(window means, ddof=1) / sqrt(windows).
        """
        num_windows = len(window_means)
        mean = math.fsum(window_means) / num_windows
        if num_windows == 1:
            return cls(mean, None)
        variance = math.fsum((value - mean) ** 2 for value in window_means) / (num_windows - 1)
        return cls(mean, math.sqrt(variance / num_windows))

    def to_perplexity(self) -> "Estimate":
        """exp of a mean negative log-likelihood in nats; the error by the delta method, exp(mean) * error.

        Raises:
            NonFiniteError: the perplexity is beyond the largest float.
        """
        try:
            perplexity = math.exp(self.mean)
        except OverflowError:
            raise NonFiniteError(
                f"The model gives the text {self.mean:.4g} nats per token, a perplexity beyond any number "
                "(uniform guessing stays below 13 nats). Its weights are damaged: check how it was made."
            ) from None
        error = self.standard_error
        return Estimate(perplexity, None if error is None else perplexity * error)

    def to_percent(self) -> "Estimate":
        """A share in percent."""
        error = self.standard_error
        return Estimate(100 * self.mean, None if error is None else 100 * error)

    def text(self, spec: str = ".4g") -> str:
        """`12.3 ± 0.4`, each number in the format `spec`; the mean alone without an error."""
        if self.standard_error is None:
            return format(self.mean, spec)
        return f"{self.mean:{spec}} ± {self.standard_error:.2g}"


@dataclass(frozen=True)
class Measure:
    """One figure in words: its name in reports, its title, what the original has, and the estimate."""

    name: str
    title: str
    original: str
    estimate: Estimate
    spec: str

    def text(self) -> str:
        """The compressed model's."""
        return self.estimate.text(self.spec)


@dataclass(frozen=True)
class EvalReport:
    """The compressed model beside the original on the same tokens.

    Divergences are KL(original || compressed) in nats per token (pipeline/task.py). `num_tokens` counts scored tokens;
    nothing predicts the first one of a window. An encoder predicts none, and has the cosine similarity of its features
    with the original's instead.
    """

    kl_divergence: Estimate
    kl_p99: float
    num_tokens: int
    num_windows: int
    seq_len: int
    tokens_sha256: str
    perplexity: Estimate | None = None
    base_perplexity: Estimate | None = None
    top1_agreement: Estimate | None = None
    cosine_similarity: Estimate | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values with sorted keys, without those that there are not; `from_json` gives back an equal report."""
        return {key: value for key, value in sorted(asdict(self).items()) if value is not None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "EvalReport":
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: a field is missing or unknown.
        """
        measured = _OF_FEATURES if "cosine_similarity" in data else _OF_PREDICTIONS
        wanted = {field.name for field in fields(cls)} - _OF_FEATURES - _OF_PREDICTIONS | measured
        if set(data) != wanted:
            raise CheckpointError(
                f"The evaluation report lacks {sorted(wanted - set(data))} and has the unknown fields "
                f"{sorted(set(data) - wanted)}: it is damaged or of another version. Evaluate again."
            )
        return cls(**{**data, **{name: Estimate(**data[name]) for name in {"kl_divergence"} | measured}})

    def measures(self) -> list[Measure]:
        """What people compare."""
        found = [Measure("kl_divergence", "KL divergence (nats/token)", "0", self.kl_divergence, ".3g")]
        if self.perplexity and self.base_perplexity:
            found.insert(0, Measure("perplexity", "perplexity", self.base_perplexity.text(), self.perplexity, ".4g"))
        if self.top1_agreement:
            agreement = self.top1_agreement.to_percent()
            found.append(Measure("top1_agreement", "top-1 agreement (%)", "100", agreement, ".4g"))
        if self.cosine_similarity:
            found.append(Measure("cosine_similarity", "cosine similarity", "1", self.cosine_similarity, ".5g"))
        return found

    def rows(self) -> list[tuple[str, str, str]]:
        """(label, original, compressed) for tables; the original's distance from itself is zero."""
        counted = f"{self.num_tokens:,} in {self.num_windows} x {self.seq_len}"
        rows = [(measure.title, measure.original, measure.text()) for measure in self.measures()]
        at = next(place for place, (title, _, _) in enumerate(rows) if title.startswith("KL"))
        rows[at] = ("KL divergence, mean (nats/token)", *rows[at][1:])
        rows.insert(at + 1, ("KL divergence, 99th percentile", "0", f"{self.kl_p99:.3g}"))
        return [*rows, ("tokens scored", counted, counted)]
