"""The table that people look at first, in the report and in the card; no torch, so that a push is quick."""

from typing import Any

from pipeline.budget import human_bytes
from pipeline.eval_report import EvalReport


def before_after(content: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(label, original, compressed) with standard errors, from the content of report.json."""
    folder, matrices = content["sizes"]["folder"], content["sizes"]["matrices"]
    share = folder["compressed"] / folder["original"]
    before = 8 * matrices["original"] / content["num_matrix_params"]
    after = f"{human_bytes(folder['compressed'])} ({share:.1%})"
    rows = [
        ("size of the folder", human_bytes(folder["original"]), after),
        ("bits per parameter of the compressed matrices", f"{before:g}", f"{content['bits_per_param']:.4f}"),
    ]
    if content["evaluation"]:
        rows += EvalReport.from_json(content["evaluation"]["report"]).rows()
    return rows
