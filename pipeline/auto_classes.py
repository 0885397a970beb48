"""transformers' auto classes that open a compressed model, and the Hub's task of each; read without transformers."""

from typing import Any

HUB_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModel": "feature-extraction",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForPreTraining": "feature-extraction",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTextEncoding": "feature-extraction",
    "AutoModelForTokenClassification": "token-classification",
}
GENERATING = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM")


def known_class(report: dict[str, Any] | None) -> str:
    """The class that a report.json names; a decoder's where there is none, or a word that is none of these."""
    named = report.get("auto_class") if report else None
    return named if isinstance(named, str) and named in HUB_TASKS else "AutoModelForCausalLM"
