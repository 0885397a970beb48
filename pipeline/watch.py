"""watch(): has the base model changed on the Hub since the last version that was made from it?

A base moves on: weights are mended, a tokenizer is replaced. Whoever keeps compressed versions of it asks now and then,
and makes a new one where the answer is "changed". The Hub itself is asked each time; no cache answers for it.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.origin import base_model_of
from pipeline.sources import HUB_TIMEOUT_SECONDS
from registry import HubNotFoundError, Registry, RegistryError, Version, checked_name
from registry.hub_client import limit_waits
from registry.hub_errors import hub_errors

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

    Ask = Callable[[str, str], ModelInfo | RegistryError]

State = Literal["unchanged", "changed", "gone", "not from the Hub", "not asked"]


@dataclass(frozen=True)
class BaseModelChange:
    """One name in the registry, and where its base model stands; what is not known is None.

    Attributes:
        version: the number of the latest version made from a model on the Hub; of the latest, where none was.
        state: "gone" where the Hub has no such repository or revision, or does not show it to this token; "not asked"
            where the Hub did not answer, or nobody can read what the version was made from.
        base: id on the Hub.
        revision: the branch, tag or commit that the version was made from.
        commit_then, commit_now: what that named when the version was made, and what it names now.
        modified_at: when the repository was last changed, ISO 8601.
        problem: why it is gone, or was not asked.
    """

    name: str
    version: int
    state: State
    base: str | None = None
    revision: str | None = None
    commit_then: str | None = None
    commit_now: str | None = None
    modified_at: str | None = None
    problem: str | None = None

    @property
    def is_changed(self) -> bool | None:
        """None where that is not known."""
        return {"changed": True, "unchanged": False}.get(self.state)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self) | {"is_changed": self.is_changed}


def watch(
    registry: Registry, names: Iterable[str] = (), *, endpoint: str | None = None, token: str | None = None
) -> list[BaseModelChange]:
    """Ask the Hub about the base of each name's latest version from there; without names, of all.

    What goes wrong with one base stands in its answer, and the others are asked. Each base is asked for once.

    Args:
        endpoint, token: default to HF_ENDPOINT and to the login of `hf auth login` or HF_TOKEN.
    Raises:
        NotFoundError: the registry has no such name.
        InvalidNameError: a name is malformed.
    """
    wanted = [registry.version(checked_name(name)).name for name in dict.fromkeys(names)]
    versions = {name: list(group) for name, group in groupby(registry.versions(), key=lambda version: version.name)}

    @cache
    def ask(base: str, revision: str) -> "ModelInfo | RegistryError":
        return ask_hub(base, revision, registry.root, endpoint, token)

    return [_watched(registry, versions[name], ask) for name in wanted or versions]


def _watched(registry: Registry, versions: list[Version], ask: "Ask") -> BaseModelChange:
    """The answer for the versions of one name, the oldest first."""
    latest = versions[-1]
    try:
        recipes = ((version, _recipe(registry, version)) for version in reversed(versions))
        version, recipe = next(((version, recipe) for version, recipe in recipes if _commit(recipe)), (latest, {}))
    except (RegistryError, OSError, ValueError) as error:
        problem = f"What a version of {latest.name} was made from cannot be read: {error}"
        return BaseModelChange(latest.name, latest.number, "not asked", problem=problem)
    commit = _commit(recipe)
    base = base_model_of(recipe) if commit else None
    if base is None:
        return BaseModelChange(version.name, version.number, "not from the Hub")
    revision = recipe.get("revision") or "main"
    found = ask(base, revision)
    if isinstance(found, RegistryError):
        state: State = "gone" if isinstance(found, HubNotFoundError) else "not asked"
        return BaseModelChange(version.name, version.number, state, base, revision, commit, problem=str(found))
    return BaseModelChange(
        version.name,
        version.number,
        "unchanged" if found.sha == commit else "changed",
        base,
        revision,
        commit,
        found.sha,
        found.last_modified.isoformat(timespec="seconds") if found.last_modified else None,
    )


def ask_hub(
    base: str, revision: str, folder: Path, endpoint: str | None = None, token: str | None = None
) -> "ModelInfo | RegistryError":
    """What the Hub says now of that revision, or why it says nothing; `folder` is the registry's."""
    from huggingface_hub import HfApi, get_token

    token = token or get_token()
    limit_waits()
    try:
        with hub_errors(base, "read", token, folder):
            api = HfApi(endpoint=endpoint, token=token, library_name="bitsmith")
            return api.model_info(base, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except RegistryError as error:
        return error


def _recipe(registry: Registry, version: Version) -> dict[str, Any]:
    """recipe.json; empty where the version has none, as it was not made by `compress`. Raises ValueError."""
    artifact = registry.get(version.digest)
    if "recipe.json" not in artifact.files:
        return {}
    recipe = json.loads(registry.path(artifact, "recipe.json").read_text(encoding="utf-8"))
    if not isinstance(recipe, dict) or not isinstance(recipe.get("model"), str):
        raise ValueError(f"recipe.json of {version} names no model")
    return recipe


def _commit(recipe: dict[str, Any]) -> str | None:
    return recipe.get("model_commit")
