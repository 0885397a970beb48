"""read_news(): is there anything to compress again? Told before a model is opened.

There is where none of a name's versions was made from the base as it is now with the recipe: of a model on the Hub the
commit is asked for, of local files the hash is taken (about a second per GB). Where both are what they were once
before, the version of then is what is wanted, be there later ones.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from pipeline.errors import PipelineError
from pipeline.home import expanded
from pipeline.origin import hub_id, without_local_folders
from pipeline.progress import SILENT, Progress
from pipeline.recipe import Recipe, default_of
from pipeline.sources import DEMO, demo_gguf
from pipeline.version_documents import read_document
from pipeline.watch import ask_hub
from registry import NotFoundError, Registry, RegistryError, Version


@dataclass(frozen=True)
class News:
    """What is new for some budgets of a model.

    Attributes:
        changes: a sentence each; empty if nothing is new.
        base: what the base is now: the commit on the Hub, or the hash of local files.
        key: 12 hex digits that name base and recipe; other ones for anything that would give other bytes.
        versions: of each name, the version that is as it should be now; empty if something is new.
    """

    changes: tuple[str, ...]
    base: str
    key: str
    versions: tuple[str, ...] = ()


def read_news(registry: Registry, recipes: Sequence[Recipe], names: Sequence[str], progress: Progress = SILENT) -> News:
    """Compare each recipe, and its base as it is now, with the versions of its name.

    Args:
        recipes: of one model; they differ in the budget.
    Raises:
        HubNotFoundError, HubAuthError: the base is not on the Hub any more, or is not shown to this token.
        HubUnavailableError: the Hub does not answer now.
        ModelError: there is no such model on this disk.
    """
    field, base = _base(recipes[0], registry, progress)
    changes: list[str] = []
    versions: list[str] = []
    for recipe, name in zip(recipes, names, strict=True):
        try:
            latest = registry.version(name)
        except NotFoundError:
            changes.append(f"{name} has no version yet")
            continue
        since = list(_changes(registry, recipe, latest, field, base))
        others = reversed(registry.versions()) if since else [latest]
        made_so = (each for each in others if each.name == name and _is_of(registry, recipe, each, field, base))
        if (found := next(made_so, None)) is None:
            changes += since
        else:
            versions.append(str(found))
    state = [recipes[0].model_copy(update={"budget": ""}).to_json(), base]
    key = sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:12]
    return News(tuple(dict.fromkeys(changes)), base, key, () if changes else tuple(versions))


def _is_of(registry: Registry, recipe: Recipe, version: Version, field: str, base: str) -> bool:
    try:
        return not list(_changes(registry, recipe, version, field, base))
    except (PipelineError, RegistryError):  # one of long ago that is damaged, or whose recipe nobody can read
        return False


def _changes(registry: Registry, recipe: Recipe, version: Version, field: str, base: str) -> Iterator[str]:
    """Since the version was made."""
    before = _recipe_of(registry, version)
    public = without_local_folders(recipe.to_json() | {field: base})  # as recipe.json has it
    for setting in recipe.to_json():
        now = public[setting]
        if (was := before.get(setting, default_of(setting))) != now:
            yield f"the recipe of {version} had {setting} {was!r}, and it is {now!r} now"
    if (was := before.get(field)) != base:
        yield f"{recipe.model} was {str(was)[:12]} when {version} was made, and is {base[:12]} now"


def _base(recipe: Recipe, registry: Registry, progress: Progress) -> tuple[str, str]:
    """The field of recipe.json that pins the base, and what would stand there now."""
    if _is_local(recipe):
        from pipeline.model import open_model

        opened = open_model(
            recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code, progress=progress
        )
        return "model_sha256", opened.digest
    repo = hub_id(recipe.model, "") or recipe.model
    found = ask_hub(repo, recipe.revision or "main", registry.root)
    if isinstance(found, RegistryError):
        raise found
    return "model_commit", str(found.sha)


def _is_local(recipe: Recipe) -> bool:
    """As pipeline.sources.find_source decides."""
    if recipe.model == DEMO:
        return recipe.revision is None and demo_gguf() is not None
    return expanded(recipe.model).exists()


def _recipe_of(registry: Registry, version: Version) -> dict[str, Any]:
    artifact = registry.get(version.digest)
    if "recipe.json" not in artifact.files:
        return {}
    return read_document(registry.path(artifact, "recipe.json"), f"recipe.json of {version}")
