"""The model card's header, in the Hub's words (huggingface.co/docs/hub/model-cards).

What stands in files of others (report.json and recipe.json may have been imported) gets in only as an identifier, a
code, a slug or a link of the kind that belongs there; anything else is left out.
"""

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.auto_classes import HUB_TASKS, known_class
from pipeline.eval_report import Estimate, EvalReport
from pipeline.markdown import shortened
from pipeline.origin import HUB_LICENSES, base_model_of, hub_dataset, is_language, last_part, slug
from pipeline.version_facts import VersionFacts

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

# pipeline/data/README.md
_BUNDLED = {
    "bundled:evaluation.txt": {
        "dataset_type": "Salesforce/wikitext",
        "dataset_name": "WikiText-2 raw, test",
        "dataset_config": "wikitext-2-raw-v1",
        "dataset_split": "test",
    }
}
# a file's kind in the words of the library `datasets`
_LOADERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
_METRICS = {
    "perplexity": "Perplexity",
    "kl_divergence": "KL divergence from the original, nats per token",
    "top1_agreement": "Top-1 agreement with the original, %",
    "cosine_similarity": "Cosine similarity of the features with the original's",
}
_LINK = re.compile(r"[!-;=?-~]+")  # no space, no angle bracket, ASCII


def card_header(facts: VersionFacts, name: str) -> "ModelCardData":
    """The header; what is not known is left out.

    Args:
        name: of the model in its results, the last part of the repository's.
    """
    from huggingface_hub import ModelCardData

    base_model, auto = base_model_of(facts.recipe), known_class(facts.report)
    fields: dict[str, Any] = {
        "base_model": base_model,
        "base_model_relation": "quantized" if base_model else None,
        "library_name": "transformers",
        "pipeline_tag": HUB_TASKS[auto],
        **_license(facts),
        "language": _languages(facts),
        "datasets": _calibration_data(facts.recipe),
        "tags": ["bitsmith", "quantized", "lq-lora", f"{int(facts.plan['bits_per_param'] + 0.5)}-bit"],
        "model_name": name if facts.evaluation else None,
        "eval_results": _results(facts.evaluation, HUB_TASKS[auto]) if facts.evaluation else None,
    }
    return ModelCardData(**{key: value for key, value in fields.items() if value})


def _license(facts: VersionFacts) -> dict[str, str | None]:
    origin = facts.report["origin"] if facts.report else {}
    stated = origin.get("license")
    if stated not in HUB_LICENSES:
        return {}
    name, link = origin.get("license_name"), origin.get("license_link")
    is_link = isinstance(link, str) and (link in facts.checkpoint.files or _is_web_address(link))
    return {
        "license": stated,
        "license_name": slug(name) if isinstance(name, str) else None,
        "license_link": link if is_link else None,
    }


def _is_web_address(link: str) -> bool:
    """Is it an http(s) URL without a password inside?"""
    if not _LINK.fullmatch(link):
        return False
    try:
        parts = urlsplit(link)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc) and "@" not in parts.netloc


def _languages(facts: VersionFacts) -> list[str]:
    return [code for code in (facts.report["origin"]["language"] if facts.report else ()) if is_language(code)]


def _calibration_data(recipe: dict[str, Any]) -> list[str]:
    """If they are on the Hub and were used."""
    used = recipe.get("sensitivity", "fisher") != "none" or recipe.get("recover", False)
    found = hub_dataset(recipe.get("dataset")) if used else None
    return [found[0]] if found else []


def _results(evaluation: dict[str, Any], hub_task: str) -> "list[EvalResult]":
    """`model-index`: plain numbers, with the standard error among each metric's arguments."""
    from huggingface_hub import EvalResult

    quality = EvalReport.from_json(evaluation["report"])
    read = {
        "num_tokens": quality.num_tokens,
        "num_windows": quality.num_windows,
        "seq_len": quality.seq_len,
        "tokens_sha256": shortened(quality.tokens_sha256),
    }
    return [
        EvalResult(
            task_type=hub_task,
            task_name=hub_task.replace("-", " ").title(),
            **_evaluation_data(evaluation["text"], evaluation.get("text_commit")),
            dataset_args=read,
            metric_type=measure.name,
            metric_name=_METRICS[measure.name],
            metric_value=_rounded(measure.estimate.mean),
            metric_args=_error(measure.estimate),
        )
        for measure in quality.measures()
    ]


def _evaluation_data(text: str, commit: str | None) -> dict[str, Any]:
    """The dataset's part of a result; a file has the name of its kind in place of an id."""
    if text in _BUNDLED:
        return _BUNDLED[text]
    if (found := hub_dataset(text)) is not None:
        dataset, config = found
        return {
            "dataset_type": dataset,
            "dataset_name": text,
            "dataset_config": config,
            "dataset_split": "test",
            "dataset_revision": shortened(commit) if commit else None,
        }
    suffix = text[text.rfind(".") :].lower()
    return {"dataset_type": _LOADERS.get(suffix, "text"), "dataset_name": shortened(last_part(text))}


def _error(estimate: Estimate) -> dict[str, float] | None:
    return None if estimate.standard_error is None else {"standard_error": _rounded(estimate.standard_error)}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
