"""The output folder: never overwritten, never half there.

OUT.partial/recipe.json    the run that is on its way to OUT
OUT.partial/checkpoint/    the folder, until it has passed its audit
OUT/                       appears by one rename
OUT/report/                added after the evaluation
"""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pipeline.atomic import write_json
from pipeline.errors import CheckpointError, OutputExistsError
from pipeline.recipe import refuse_changes
from pipeline.sweep_folder import is_sweep_folder
from registry import Artifact, Registry
from registry.lock import exclusive
from registry.store import hash_file


class OutputFolder:
    """The folder `path` on behalf of one recipe (plain JSON, as written to recipe.json)."""

    def __init__(self, path: Path, recipe: dict[str, Any]) -> None:
        self.path, self.recipe = path, recipe
        self.partial = path.with_name(f"{path.name}.partial")

    def claim(self, *, resume: bool) -> None:
        """Make sure that the folder is ours to fill, and note the recipe of the run.

        Raises:
            OutputExistsError: it holds something else, or is finished and `resume` is off.
            RecipeChangedError: it was started or made with another recipe.
        """
        self.check_claim(resume=resume)
        if not _is_empty(self.path) and not self.partial.exists():
            return  # which may be where nobody can write
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.alone():
            self.check_claim(resume=resume)
            if not _is_empty(self.path):
                shutil.rmtree(self.partial, ignore_errors=True)  # left where a kill came right after the rename
                return
            if self.partial.exists() and not resume:
                shutil.rmtree(self.partial)
            self.partial.mkdir(exist_ok=True)
            write_json(self.partial / "recipe.json", self.recipe)

    def check_claim(self, *, resume: bool) -> None:
        """Raise what `claim` would raise, and change nothing."""
        note = self.partial / "recipe.json"
        if not _is_empty(self.path):
            self._check_finished(resume)
        elif resume and note.exists():
            advice = (
                "Run the command with the earlier settings to go on, choose another output folder with -o, or start "
                "this one over with --no-resume."
            )
            refuse_changes(read_recipe(self.partial), self.recipe, f"The unfinished run in {self.partial}", advice)
        elif resume and self.partial.exists() and any(self.partial.iterdir()):
            raise OutputExistsError(
                f"{self.partial} is in the way: unfinished work goes there, and it holds something else. Move it, or "
                "choose another output folder with -o."
            )

    def alone(self, on_wait: Callable[[], None] = lambda: None) -> AbstractContextManager[None]:
        """With no other process that writes the folder; what was true before may not be any more.

        Args:
            on_wait: called once where there is one, before waiting for it.
        """
        return exclusive(self.path.with_name(f".{self.path.name}.lock"), on_wait)

    def is_finished(self) -> bool:
        """Is the checkpoint in its place?"""
        return (self.path / "recipe.json").is_file()

    def stage(self, registry: Registry, checkpoint: Artifact) -> Path:
        """Write the checkpoint into the partial folder, to be audited there."""
        staged = self.partial / "checkpoint"
        shutil.rmtree(staged, ignore_errors=True)
        registry.materialize(checkpoint, staged)
        return staged

    def finish(self) -> None:
        """Move the staged checkpoint to its place."""
        (self.partial / "checkpoint").rename(self.path)
        shutil.rmtree(self.partial)

    def is_reported(self) -> bool:
        """Is the report there too?"""
        return (self.path / "report").is_dir()

    def check_unchanged(self, registry: Registry, checkpoint: Artifact) -> None:
        """Raise OutputExistsError if a finished folder no longer holds what was written.

        Where the folder is sound and the registry's own copy is not, the copy is made anew.
        """
        for name, entry in checkpoint.files.items():
            path = self.path / name
            if not path.is_file() or hash_file(path) != entry:
                raise OutputExistsError(
                    f"{path} is missing or was changed after it was written; {self.path} is no longer the "
                    "checkpoint of this recipe. Move the folder away, or choose another one with -o."
                )
            if not registry.store.is_sound(entry):
                registry.store.add(path)

    def add_report(self, registry: Registry, report: Artifact) -> None:
        """Put the report into the finished folder, unless it is there."""
        target, temporary = self.path / "report", self.path / ".report.tmp"

        def is_there() -> bool:
            files = ((target / name, entry) for name, entry in report.files.items())
            return all(path.is_file() and hash_file(path) == entry for path, entry in files)

        if is_there():
            return
        with self.alone():
            if is_there():
                return
            shutil.rmtree(temporary, ignore_errors=True)
            registry.materialize(report, temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)

    def _check_finished(self, resume: bool) -> None:
        check_free(self.path)
        advice = "Choose another output folder with -o; this one is finished and stays as it is."
        refuse_changes(read_recipe(self.path), self.recipe, f"The finished checkpoint in {self.path}", advice)
        if not resume:
            raise OutputExistsError(
                f"{self.path} holds the finished checkpoint of this recipe, and --no-resume would make it again. "
                "Delete it first, or choose another folder with -o."
            )


def read_recipe(folder: Path) -> dict[str, Any]:
    """What decided the checkpoint in `folder`, or the unfinished run.

    Raises:
        CheckpointError: recipe.json is missing, cut off or something else.
    """
    note = folder / "recipe.json"
    try:
        recipe = json.loads(note.read_text(encoding="utf-8"))
        if not isinstance(recipe, dict):
            raise ValueError(f"it holds a {type(recipe).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{note} cannot be read ({error}); it says what {folder} was made from. Move the folder away and make it "
            "again, or pull it from where it was pushed."
        ) from error
    return recipe


def base_of(folder: Path) -> tuple[str, str | None]:
    """The model that a checkpoint was made from, and its commit on the Hub.

    Raises:
        CheckpointError: recipe.json does not say so.
    """
    recipe = read_recipe(folder)
    if "model" not in recipe:
        raise CheckpointError(
            f"{folder / 'recipe.json'} names no model, so the original of this checkpoint is unknown."
        )
    return str(recipe["model"]), recipe.get("model_commit")


def check_free(path: Path) -> None:
    """Raise OutputExistsError if `path` holds something that is not a checkpoint of ours."""
    if path.exists() and not path.is_dir():
        raise OutputExistsError(
            f"The output {path} is a file, and a folder is to be written. Choose another name with -o."
        )
    if is_sweep_folder(path):
        raise OutputExistsError(
            f"The output folder {path} holds checkpoints of several budgets. For one more of them, give at least two "
            "budgets, or name a folder below it with -o."
        )
    if not _is_empty(path) and not (path / "recipe.json").is_file():
        raise OutputExistsError(
            f"The output folder {path} is not empty and was not made by bitsmith. Choose another one with "
            "-o, or empty it."
        )


def check_compressed(folder: Path) -> None:
    """Raise CheckpointError if `folder` is not one that this program wrote."""
    if not (folder / "plan.json").is_file() or not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is not a compressed checkpoint: it has no plan.json. Name a folder that `bitsmith "
            "compress` wrote, or that `bitsmith pull REPO -o FOLDER` fetched."
        )


def _is_empty(path: Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))
