"""Models that bring their own modeling code: `--trust-remote-code` runs it, nothing else does.

config.json and tokenizer_config.json name the classes in `auto_map`, as "modeling_x.XForCausalLM" beside the weights or
as "user/name--modeling_x.XForCausalLM" in a repository of the Hub. A config that was read without consent has lost its
`auto_map`, so that whatever is made from it later runs transformers' own code.

A checkpoint of a Hub's model holds no code: it refers to the commit of the original's repository, from where it comes
when somebody opens the checkpoint and trusts it. One of a local folder, to which nobody else could refer, has a copy.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import CheckpointError, ModelError
from pipeline.hub_failures import hub_failures
from registry.hub_client import limit_waits

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CODE_FILES = "*.py"
# JSON files that may name classes
REFERRING_FILES = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
TRUST_ADVICE = (
    "The model brings code of its own, and such code is run only on request, for it may do anything that you may. Read "
    "it, and give --trust-remote-code if you trust it."
)


def code_files(folder: Path) -> list[str]:
    """The modules that a model's folder names, and those that they import from there; paths in it, sorted."""
    from transformers.dynamic_module_utils import get_relative_import_files

    modules = {f"{reference.partition('.')[0]}.py" for reference in _references(folder)}
    paths = [folder / module for module in modules if (folder / module).is_file()]
    found = {*paths, *(Path(each) for path in paths for each in get_relative_import_files(path))}
    return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())


def refuse_code_elsewhere(folder: Path) -> None:
    """Raise ModelError if a model's folder names code of another repository, of which nobody says the commit."""
    for reference in _references(folder):
        if "--" in reference:
            elsewhere = reference.partition("--")[0]
            raise ModelError(
                f"{folder} names code of another repository ({elsewhere}), and only code that lies beside the weights "
                f"is run. Put that repository's .py files into a copy of the folder, and take '{elsewhere}--' out of "
                "its config.json and tokenizer_config.json."
            )


def names_code(folder: Path) -> bool:
    """Does the folder name classes that transformers would have to be trusted with?"""
    return any(True for _ in _references(folder))


def brings_code(config: "PretrainedConfig") -> bool:
    """Was it read with consent, and does it name classes of its own?"""
    return bool(getattr(config, "auto_map", None))


def forget_code(config: "PretrainedConfig") -> None:
    """Nothing made from it will run code of the model's own."""
    if brings_code(config):
        del config.auto_map


def referring_to(repo_id: str | None, content: dict[str, Any]) -> dict[str, Any]:
    """One of REFERRING_FILES whose classes are looked for in a repository of the Hub; None: where they were."""
    named = content.get("auto_map")
    return content if named is None or repo_id is None else content | {"auto_map": _qualified(repo_id, named)}


def loading_options(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Of transformers' `from_pretrained` for a checkpoint: its code, if trusted, is that of the commit it came from.

    Downloads that code unless it was downloaded before.

    Raises:
        CheckpointError: nobody says which commit, or the code is not to be had.
    """
    if not trust_remote_code:
        return {"trust_remote_code": False}
    repos = {reference.partition("--")[0] for reference in _references(folder) if "--" in reference}
    if not repos:
        return {"trust_remote_code": True}
    commit = code_commit(_read(folder / "recipe.json"))
    if commit is None or len(repos) > 1:
        raise CheckpointError(
            f"{folder} names code in {', '.join(sorted(repos))}, and its recipe.json does not say of which commit: "
            "it is damaged, or was not written by `bitsmith compress --trust-remote-code`."
        )
    from huggingface_hub import snapshot_download

    limit_waits()
    try:
        snapshot_download(repos.pop(), revision=commit, allow_patterns=CODE_FILES)
    except hub_failures(ValueError) as error:
        raise CheckpointError(
            f"The code that {folder} refers to cannot be fetched from the Hub ({type(error).__name__}), and is not in "
            "its cache on this disk. Try again with a connection."
        ) from error
    return {"trust_remote_code": True, "code_revision": commit}


def code_commit(recipe: dict[str, Any]) -> str | None:
    """Of a recipe.json, the commit on the Hub of the code that the model brings, if it was run."""
    commit = recipe.get("model_commit") if recipe.get("runs_own_code") else None
    return commit if isinstance(commit, str) else None


def _references(folder: Path) -> Iterator[str]:
    for name in REFERRING_FILES[:2]:  # bitsmith uses no preprocessors
        named = _read(folder / name).get("auto_map")
        values = named.values() if isinstance(named, dict) else [named]
        for value in values:
            yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _qualified(repo_id: str, classes: Any) -> Any:
    if isinstance(classes, dict):
        return {key: _qualified(repo_id, each) for key, each in classes.items()}
    if isinstance(classes, list):
        return [_qualified(repo_id, each) for each in classes]
    return f"{repo_id}--{classes}" if isinstance(classes, str) and "--" not in classes else classes
