"""Models that bring their own modeling code: `--trust-remote-code` runs it, nothing else does.

config.json names the classes in `auto_map`, as "modeling_x.XForCausalLM" beside the weights or as
"user/name--modeling_x.XForCausalLM" in a repository of the Hub. A config that was read without consent has lost its
`auto_map`, so that whatever is made from it later runs transformers' own code.

A checkpoint of a Hub's model holds no code: it refers to the commit of the original's repository. That of a local
folder, which nobody else could refer to, gets a copy of the folder's code.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CODE_FILES = "*.py"
# JSON files that may name classes; preprocessors are left as they are, for bitsmith uses none
REFERRING_FILES = ("config.json", "tokenizer_config.json")
TRUST_ADVICE = (
    "The model brings code of its own, and such code is run only on request, for it may do anything that you may. Read "
    "it, and give --trust-remote-code if you trust it."
)


def code_files(folder: Path) -> list[str]:
    """Paths of the code below a model's folder, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob(CODE_FILES) if path.is_file())


def brings_code(config: "PretrainedConfig") -> bool:
    """Was it read with consent, and does it name classes of its own?"""
    return bool(getattr(config, "auto_map", None))


def forget_code(config: "PretrainedConfig") -> None:
    """Nothing made from it will run code of the model's own."""
    if brings_code(config):
        del config.auto_map


def names_code(folder: Path) -> bool:
    """Does its config.json name classes that come with the model?"""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and bool(content.get("auto_map"))


def referring_to(repo_id: str, content: dict[str, Any]) -> dict[str, Any]:
    """A config.json or tokenizer_config.json whose classes are looked for in a repository of the Hub."""
    named = content.get("auto_map")
    if not isinstance(named, dict):
        return content
    return content | {"auto_map": {auto: _qualified(repo_id, classes) for auto, classes in named.items()}}


def loading_options(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Of transformers' `from_pretrained` for a checkpoint: its code, if trusted, is that of the commit it came from."""
    if not trust_remote_code:
        return {"trust_remote_code": False}
    try:
        commit = json.loads((folder / "recipe.json").read_text(encoding="utf-8")).get("model_commit")
    except (OSError, ValueError, AttributeError):
        commit = None
    return {"trust_remote_code": True} | ({"code_revision": commit} if isinstance(commit, str) else {})


def code_commit(recipe: dict[str, Any]) -> str | None:
    """Of a recipe.json, the commit on the Hub of the code that the model brings, if it was run."""
    commit = recipe.get("model_commit") if recipe.get("trust_remote_code") else None
    return commit if isinstance(commit, str) else None


def _qualified(repo_id: str, classes: Any) -> Any:
    if isinstance(classes, list):
        return [_qualified(repo_id, each) for each in classes]
    return f"{repo_id}--{classes}" if isinstance(classes, str) and "--" not in classes else classes
