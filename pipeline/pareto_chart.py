"""The picture of several budgets: quality over bits per parameter, with error bars where it was measured."""

from typing import TYPE_CHECKING, Any

from pipeline.charts import WIDTH_INCHES, Theme, error_name, logarithmic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT_INCHES = 4.0


def draw_pareto(content: dict[str, Any], theme: Theme) -> "Figure":
    """KL divergence, and perplexity or cosine similarity beside the original's; the predicted cost if nothing is known.

    Args:
        content: as of pareto.json.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    if content["points"][0]["kl_divergence"] is None:
        _draw(figure.subplots(), content, "predicted_cost", f"{error_name(content)}, predicted", theme)
        return figure
    left, right = figure.subplots(1, 2)
    _draw(left, content, "kl_divergence", "KL divergence (nats per token)", theme)
    if content["original"]["perplexity"] is None:
        _draw(right, content, "cosine_similarity", "Cosine similarity of the features", theme)
        return figure
    _draw(right, content, "perplexity", "Perplexity", theme)
    right.axhline(content["original"]["perplexity"]["mean"], color=theme.muted, linestyle="--", label="original")
    right.legend(loc="upper right")
    return figure


def _draw(axes: "Axes", content: dict[str, Any], measure: str, title: str, theme: Theme) -> None:
    points = content["points"]
    bits = [point["bits_per_param"] for point in points]
    estimates = [_estimate(point[measure]) for point in points]
    means, errors = [mean for mean, _ in estimates], [error for _, error in estimates]
    if min(means) > 0 and max(means) > 2 * min(means):
        logarithmic(axes)
    style = {
        "color": theme.accent,
        "linewidth": 2,
        "markersize": 5,
        "capsize": 3,
        "elinewidth": 1.2,
        "ecolor": theme.muted,
    }
    axes.errorbar(bits, means, yerr=errors if any(errors) else None, fmt="o-", **style)  # type: ignore[arg-type]
    for point, mean in zip(points, means, strict=True):
        axes.annotate(
            point["budget"],
            (point["bits_per_param"], mean),
            xytext=(6, 6),
            textcoords="offset points",
            fontsize=7.5,
            color=theme.ink,
        )
    axes.margins(x=0.12)
    axes.set_title(title)
    axes.set_xlabel("bits per parameter")
    axes.tick_params(length=0, which="both")
    axes.grid(which="major")
    axes.spines["left"].set_visible(False)


def _estimate(measured: dict[str, Any] | float) -> tuple[float, float]:
    """Mean and standard error; 0 where there is none."""
    return (measured["mean"], measured["standard_error"] or 0.0) if isinstance(measured, dict) else (measured, 0.0)
