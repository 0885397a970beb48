"""The pictures of reports, each drawn from the figures (figures.py) for a light or a dark page.

The same figures give the same bytes: one font that matplotlib brings along, no date and no version inside.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 180
WIDTH_INCHES = 9.5
NARROWEST_ANNOTATED_INCHES = 0.21


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    surface: str
    ink: str
    muted: str
    grid: str
    accent: str
    contrast: str
    few_bits: str
    many_bits: str


LIGHT = Theme("#ffffff", "#1b2430", "#5c6878", "#e4e8ee", "#2463c4", "#d0571b", "#e9f1fc", "#0d3476")
DARK = Theme("#171c24", "#e4e9f0", "#9aa6b6", "#2c3440", "#6da5f8", "#f59562", "#22304a", "#a8cdff")


def png(draw: Callable[[dict[str, Any], Theme], "Figure"], figures: dict[str, Any], theme: Theme) -> bytes:
    """The picture that `draw` makes of the figures."""
    from matplotlib import style

    settings = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": theme.ink,
        "text.parse_math": False,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": theme.surface,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.formatter.use_mathtext": False,
        "figure.facecolor": theme.surface,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "legend.frameon": False,
        "legend.labelcolor": theme.ink,
    }
    with style.context(["default", settings], after_reset=True):
        buffer = io.BytesIO()
        draw(figures, theme).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def draw_heat_map(figures: dict[str, Any], theme: Theme) -> "Figure":
    """Bits per parameter by layer and type, with the numbers where they fit."""
    from matplotlib.colors import LinearSegmentedColormap

    heat_map = figures["heat_map"]
    bits = np.array([[np.nan if cell is None else cell for cell in row] for row in heat_map["bits"]])
    num_types, num_layers = bits.shape
    figure, axes = _figure(1.25 + 0.34 * num_types)
    ramp = LinearSegmentedColormap.from_list("bits", [theme.few_bits, theme.many_bits])
    colours = ramp.with_extremes(bad=theme.surface)
    low, high = float(np.nanmin(bits)), float(np.nanmax(bits))
    image = axes.imshow(bits, cmap=colours, aspect="auto", vmin=low, vmax=max(high, low + 0.1))
    axes.set_title("Bits per parameter of every matrix, by layer and type")
    axes.set_xlabel("layer")
    axes.set_yticks(range(num_types), heat_map["types"])
    step = -(-num_layers // 40)
    axes.set_xticks(range(0, num_layers, step), [str(layer) for layer in heat_map["layers"][::step]])
    axes.set_xticks(np.arange(-0.5, num_layers), minor=True)
    axes.set_yticks(np.arange(-0.5, num_types), minor=True)
    axes.grid(which="minor", color=theme.surface, linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.tick_params(axis="y", labelcolor=theme.ink)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.025, pad=0.015)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(length=0)
    if (WIDTH_INCHES - 2.2) / num_layers >= NARROWEST_ANNOTATED_INCHES:
        _annotate(axes, bits, image)
    return figure


def draw_cost_per_layer(figures: dict[str, Any], theme: Theme) -> "Figure":
    """Predicted error as bars, achieved error as dots."""
    from matplotlib.ticker import MaxNLocator

    rows = figures["layers"]
    layers = [row["layer"] for row in rows]
    figure, axes = _figure(3.3)
    predicted, achieved = [row["predicted"] for row in rows], [row["achieved"] for row in rows]
    bars = axes.bar(layers, predicted, color=theme.accent, width=0.72, label="predicted by the cost table")
    (dots,) = axes.plot(layers, achieved, "o", color=theme.contrast, markersize=5)
    dots.set_label("achieved by the decomposition")
    axes.set_title(f"{error_name(figures)} per layer")
    axes.set_xlabel("layer")
    axes.set_xlim(min(layers) - 0.75, max(layers) + 0.75)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
    axes.tick_params(length=0)
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.margins(y=0.2)
    axes.legend(handles=[bars, dots], ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.3)
    return figure


def draw_budget_curve(figures: dict[str, Any], theme: Theme) -> "Figure":
    """What each budget would cost: mixed choices, the best uniform choice, and this plan."""
    curve = figures["curve"]
    figure, axes = _figure(4.2)
    best = [point for point in curve["uniform"] if point["best"]]
    x, y = _coordinates(best)  # nothing lies between two uniform choices: steps, not slopes
    axes.step(x, y, "s-", where="post", color=theme.muted, markersize=4, label="best single choice for all")
    x, y = _coordinates(curve["mixed"])
    axes.plot(x, y, "-", color=theme.accent, linewidth=2, label="chosen by the integer program")
    x, y = _coordinates([curve["plan"]])
    axes.plot(x, y, "*", color=theme.contrast, markersize=15, linestyle="none", label="this plan", zorder=3)
    axes.set_title(f"{error_name(figures)} at every budget")
    axes.set_xlabel("bits per parameter")
    if all(point["cost"] > 0 for point in (*best, *curve["mixed"], curve["plan"])):
        logarithmic(axes)
    axes.tick_params(length=0, which="both")
    axes.grid(which="major")
    axes.spines["left"].set_visible(False)
    axes.legend(loc="upper right")
    return figure


ERROR_NAMES = {
    "kronecker": "Expected divergence, nats a token",
    "sequence": "Expected divergence, nats a token",
    "guided": "Expected divergence, nats a token",
    "kl": "Expected divergence, nats a token",
    "fisher": "Fisher-weighted error, nats a token",
    "factored": "Fisher-weighted error, nats a token",
    "input": "Squared error of the outputs",
    "none": "Squared error",
}
PICTURES: dict[str, Callable[[dict[str, Any], Theme], "Figure"]] = {
    "heatmap": draw_heat_map,
    "cost_per_layer": draw_cost_per_layer,
    "budget_curve": draw_budget_curve,
}


def draw_losses(figures: dict[str, Any], theme: Theme) -> "Figure":
    """Loss by step: of every step's examples as dots, on the held-out ones as a line, the kept step marked."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(3.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    losses, checks = figures["losses"], dict(figures["checks"])
    axes.plot(range(len(losses)), losses, ".", markersize=3, color=theme.muted, label="training examples of the step")
    axes.plot(*zip(*checks.items(), strict=True), "o-", color=theme.accent, markersize=4, label="held-out examples")
    kept = figures["kept_step"]
    axes.plot([kept], [checks[kept]], "o", color=theme.contrast, markersize=8, fillstyle="none", label="kept")
    axes.set_title("Loss of the answers' tokens (nats)")
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.legend()
    return figure


def error_name(figures: dict[str, Any]) -> str:
    """What costs are in this run."""
    return ERROR_NAMES[figures["recipe"].get("sensitivity", "fisher")]


def _figure(height_inches: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    return figure, figure.subplots()


def _coordinates(points: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [point["bits_per_param"] for point in points], [point["cost"] for point in points]


def _annotate(axes: "Axes", bits: np.ndarray, image: Any) -> None:
    for (row, column), value in np.ndenumerate(bits):
        if np.isnan(value):
            continue
        colour = image.cmap(image.norm(value))
        axes.text(
            column,
            row,
            f"{value:.1f}",
            ha="center",
            va="center",
            fontsize=6.5,
            color="#10151c" if _luminance(colour) > 0.22 else "#ffffff",
        )


def _luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance, 0 to 1, with sRGB's gamma taken as 2.2."""
    red, green, blue = (channel**2.2 for channel in colour[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def logarithmic(axes: "Axes") -> None:
    """A logarithmic cost axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
