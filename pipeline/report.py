"""The report: one HTML file that needs nothing else, its pictures for a README, and the figures behind them.

index.html                                          pictures inside, no script, no request, light and dark
heatmap.png  cost_per_layer.png  budget_curve.png   for a light page
report.json                                         figures.py
"""

import base64
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.atomic import replace_file, write_json
from pipeline.auto_classes import GENERATING, known_class
from pipeline.before_after import before_after
from pipeline.budget import human_bytes
from pipeline.charts import DARK, LIGHT, PICTURES, error_name, png
from pipeline.figures import ReportFacts, figures
from pipeline.own_code import code_commit
from pipeline.progress import SILENT, Progress
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["ReportFacts", "render_page", "write_report"]


def write_report(facts: ReportFacts, folder: Path, *, progress: Progress = SILENT) -> None:
    """Write the files above into `folder`, the same bytes for the same facts.

    Raises:
        OSError: `folder` cannot be written.
    """
    content = figures(facts)
    pictures: dict[str, dict[str, str]] = {}
    for name, draw in progress.track(PICTURES.items(), "Report", total=len(PICTURES)):
        light, dark = png(draw, content, LIGHT), png(draw, content, DARK)
        _write(folder / f"{name}.png", light)
        pictures[name] = {"light": data_url(light), "dark": data_url(dark)}
    page = render_page(content, pictures)
    _write(folder / "index.html", page.encode())
    write_json(folder / "report.json", content)


def render_page(content: dict[str, Any], pictures: dict[str, dict[str, str]]) -> str:
    """index.html for the figures in `content`; every text in them is escaped.

    Args:
        pictures: name -> {"light": data URL, "dark": data URL}.
    """
    return render(
        "report.html.j2",
        f=content,
        pictures=pictures,
        auto=known_class(content),
        trusts=bool(content["recipe"].get("runs_own_code")),
        code=code_commit(content["recipe"]),
        generates=known_class(content) in GENERATING,
        error_name=error_name(content),
        rows=before_after(content),
        recipe=_recipe_rows(content["recipe"]),
    )


def render(template: str, **content: Any) -> str:
    """A page of this package; every text in `content` is escaped."""
    return _templates().get_template(template).render(**content)


@cache
def _templates() -> "Environment":
    """The package's, each compiled once in a process."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipeline"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"bytes": human_bytes, "number": "{:,}".format, "digits": _digits, "exp": math.exp}
    return environment


def _digits(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}"


def _write(path: Path, data: bytes) -> None:
    replace_file(path, lambda temporary: temporary.write_bytes(data))


def data_url(data: bytes) -> str:
    """A picture inside the page."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _recipe_rows(recipe: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(setting, value, what it means), the recipe's own fields first."""
    order = [key for key in Recipe.model_fields if key in recipe]
    order += sorted(recipe.keys() - set(order))
    facts = {
        "bitsmith": "version that did the work",
        "calibration_commit": "of the calibration text on the Hub",
        "calibration_sha256": "of the calibration tokens",
        "evaluation_sha256": "of the evaluation tokens",
        "model_commit": "of the original on the Hub",
        "model_sha256": "of the original's files",
        "recovery_sha256": "of the tokens that recovery trains on and checks with",
        "runs_own_code": "code that came with the original was run",
    }
    fields = Recipe.model_fields
    return [(key, _in_words(recipe[key]), facts.get(key) or _meaning(fields.get(key))) for key in order]


def _meaning(field: Any) -> str:
    return (field.description or "") if field else ""


def _in_words(value: Any) -> str:
    if isinstance(value, list | tuple):
        words = ("=".join(map(str, entry)) if isinstance(entry, list | tuple) else str(entry) for entry in value)
        return ", ".join(words) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)
