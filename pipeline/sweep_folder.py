"""The folder of several budgets: what may be in it, found without torch.

A folder is one if it holds nothing but checkpoints of ours (BUDGET/, BUDGET.partial/) and their comparison.
Hidden files do not count.
"""

from pathlib import Path
from typing import Any

from pipeline.errors import OutputExistsError
from pipeline.recipe import refuse_changes
from pipeline.version_documents import read_document

COMPARISON = ("index.html", "pareto.json", "pareto.png")


def is_sweep_folder(path: Path) -> bool:
    """Does `path` hold checkpoints of several budgets, finished or not, and nothing else?"""
    entries = _entries(path)
    return bool(entries) and not _foreign(entries) and not (path / "recipe.json").exists()


def finished_folders(path: Path) -> list[Path]:
    """The checkpoints in it that are complete with their report, by name."""
    folders = [entry for entry in _entries(path) if (entry / "recipe.json").is_file()]
    return sorted(folder for folder in folders if (folder / "report" / "report.json").is_file())


def check_sweep_folder(path: Path) -> None:
    """Raise OutputExistsError if `path` cannot take checkpoints of several budgets."""
    if path.exists() and not path.is_dir():
        raise OutputExistsError(
            f"The output {path} is a file, and a folder is to be written. Choose another name with -o."
        )
    if (path / "recipe.json").is_file():
        raise OutputExistsError(
            f"{path} holds the finished checkpoint of one budget; several budgets become folders below the output. "
            "Choose another one with -o."
        )
    if foreign := _foreign(_entries(path)):
        raise OutputExistsError(
            f"The output folder {path} holds {foreign[0].name}, which was not made by bitsmith. Choose another one "
            "with -o, or empty it."
        )


def check_same_recipe(path: Path, recipe: dict[str, Any]) -> None:
    """Raise RecipeChangedError if a checkpoint in `path` differs from `recipe` in more than the budget."""
    for entry in _entries(path):
        note = entry / "recipe.json"
        if note.is_file() and not entry.name.endswith(".partial"):
            advice = "Results of different recipes are not compared: choose another output folder with -o."
            before = read_document(note, str(note)) | {"budget": ""}
            refuse_changes(before, recipe | {"budget": ""}, f"The finished checkpoint in {entry}", advice)


def _entries(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.name[0] != ".") if path.is_dir() else []


def _foreign(entries: list[Path]) -> list[Path]:
    return [entry for entry in entries if entry.name not in COMPARISON and not _is_ours(entry)]


def _is_ours(folder: Path) -> bool:
    return (folder / "recipe.json").is_file() or (
        folder.name.endswith(".partial") and folder.is_dir() and not any(folder.iterdir())
    )
