"""Several budgets side by side: what each costs in bytes and in quality, from the reports in their folders.

    OUT/pareto.json    the figures, the smallest checkpoint first
    OUT/pareto.png     quality over bits per parameter
    OUT/index.html     both, with a link to every report; needs nothing from outside

Every finished checkpoint in the folder takes part, also those of earlier commands.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.atomic import write_json
from pipeline.charts import DARK, LIGHT, error_name, png
from pipeline.command import compress_command
from pipeline.eval_report import Estimate
from pipeline.pareto_chart import draw_pareto
from pipeline.progress import SILENT, Progress
from pipeline.report import data_url, render
from pipeline.sweep_folder import COMPARISON, finished_folders
from pipeline.version_documents import read_document, reading

FORMAT_VERSION = 1


def write_pareto(out: Path, *, progress: Progress = SILENT) -> None:
    """Write the files above into `out`, the same bytes for the same checkpoints."""
    content = compare(out)
    temporary = out / ".pareto.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for _ in progress.track(["comparison"], "Compare the budgets", total=1):
        light, dark = png(draw_pareto, content, LIGHT), png(draw_pareto, content, DARK)
        (temporary / "pareto.png").write_bytes(light)
        page = render_comparison(content, {"light": data_url(light), "dark": data_url(dark)})
        (temporary / "index.html").write_text(page, encoding="utf-8")
        write_json(temporary / "pareto.json", content)
    for name in COMPARISON:
        (temporary / name).replace(out / name)
    temporary.rmdir()


def compare(out: Path) -> dict[str, Any]:
    """pareto.json. Quality is None for all where the recipe asks for no evaluation."""
    reports = {}
    for folder in finished_folders(out):
        path = folder / "report" / "report.json"
        reports[folder.name] = read_document(path, str(path))
    points = []
    for name, report in reports.items():
        with reading(f"report.json of {out / name}"):
            points.append(_point(name, report))
    points.sort(key=lambda point: (point["bits_per_param"], point["size_bytes"], point["folder"]))
    first = next(iter(reports.values()))
    budgets = ",".join(point["budget"] for point in points)
    return {
        "format_version": FORMAT_VERSION,
        "name": first["name"],
        "num_matrix_params": first["num_matrix_params"],
        "original": {
            "size_bytes": first["sizes"]["folder"]["original"],
            "perplexity": first["evaluation"]["report"].get("base_perplexity") if first["evaluation"] else None,
        },
        "text": first["evaluation"]["text"] if first["evaluation"] else None,
        "recipe": {key: value for key, value in first["recipe"].items() if key != "budget"},
        "command": compress_command(first["recipe"] | {"budget": budgets}),
        "points": points,
    }


def quality_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The points with their estimates in words, as the page and the terminal show them."""
    return [
        point
        | {
            "link": f"{quote(point['folder'])}/report/index.html",
            "share": f"{point['size_bytes'] / content['original']['size_bytes']:.1%}",
            "quality": [format_estimate(point[measure]) for measure, _, _, format_estimate in quality_columns(content)],
        }
        for point in content["points"]
    ]


def quality_columns(content: dict[str, Any]) -> list[tuple[str, str, str, Callable[[dict[str, Any]], str]]]:
    """Name, title, what the original has, and how an estimate is put in words; none where nothing was measured."""
    perplexity = content["original"]["perplexity"]
    base = Estimate(**perplexity).text() if perplexity else ""
    columns = [
        ("perplexity", "perplexity", base, lambda found: Estimate(**found).text()),
        ("kl_divergence", "KL divergence (nats/token)", "0", lambda found: Estimate(**found).text(".3g")),
        ("top1_agreement", "top-1 agreement (%)", "100", lambda found: Estimate(**found).to_percent().text()),
        ("cosine_similarity", "cosine similarity", "1", lambda found: Estimate(**found).text(".5g")),
    ]
    return [column for column in columns if content["points"][0].get(column[0])]


def render_comparison(content: dict[str, Any], picture: dict[str, str]) -> str:
    """index.html for the figures in `content`; every text in them is escaped.

    Args:
        picture: {"light": data URL, "dark": data URL}.
    """
    return render(
        "pareto.html.j2",
        f=content,
        picture=picture,
        rows=quality_rows(content),
        error_name=error_name(content),
        columns=[title for _, title, _, _ in quality_columns(content)],
        originals=[original for _, _, original, _ in quality_columns(content)],
    )


def _point(folder: str, report: dict[str, Any]) -> dict[str, Any]:
    evaluation = report["evaluation"]["report"] if report["evaluation"] else {}
    measures = ["perplexity", "kl_divergence", "kl_p99", "top1_agreement"]
    measures += ["cosine_similarity"] * ("cosine_similarity" in evaluation)
    certificate = report["certificate"]
    beside = certificate.get("embeddings_cost", 0.0)  # which the matrices of a smaller folder may have been given
    return {
        "budget": report["budget"],
        "folder": folder,
        "bits_per_param": report["bits_per_param"],
        "size_bytes": report["sizes"]["folder"]["compressed"],
        "predicted_cost": certificate["predicted_cost"] + beside,
        "lower_bound": certificate["lower_bound"] + beside,
        "checkpoint_digest": report["checkpoint_digest"],
    } | {measure: evaluation.get(measure) for measure in measures}
