"""Where a model comes from, in the Hub's words: base model, licence, languages.

A compressed model inherits its original's licence, so the report and the card state it wherever the original
does: in the header of its README, in the metadata of its GGUF, or in a LICENSE file.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from pipeline.sources import DEMO, DEMO_HUB_ID

# what a card may call a licence (huggingface.co/docs/hub/repositories-licenses); all others are "other"
# fmt: off
HUB_LICENSES = frozenset((
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigcode-openrail-m", "bigscience-bloom-rail-1.0",
    "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0",
    "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0",
    "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0",
    "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0",
    "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0",
    "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "isc",
    "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3",
    "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail", "openrail++",
    "osl-3.0", "other", "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib",
))
# fmt: on
_LICENSE_FILES = ("LICENSE*", "LICENCE*", "COPYING*")
_LICENSE_TITLES = {"apache license": "apache-2.0", "mit license": "mit"}
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?|multilingual")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_CONFIG = re.compile(r"[\w.-]{1,200}", re.ASCII)
_TEXT_FILES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Origin:
    """What is known of a model; None or empty where nothing is.

    Attributes:
        base_model: its id on the Hub.
        license: one of HUB_LICENSES; with "other", `license_name` and `license_link` say which.
        language: codes as on the Hub.
        gguf_file, gguf_sha256: the file that the weights were converted from.
    """

    base_model: str | None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    gguf_file: str | None = None
    gguf_sha256: str | None = None


def read_origin(spec: str, commit: str | None, folder: Path) -> Origin:
    """The origin of the model in `folder`, which the user named `spec`; `commit` is None for local files."""
    header = _readme_header(folder / "README.md")
    gguf = _read_json(folder / "source.json")
    license_file = next((path for glob in _LICENSE_FILES for path in sorted(folder.glob(glob))), None)
    license_id, name = _license(header.get("license") or gguf.get("license"), license_file)
    return Origin(
        base_model=hub_id(spec, commit),
        license=license_id,
        license_name=_text(header.get("license_name")) or name,
        license_link=_link(header.get("license_link"), license_file) if license_id == "other" else None,
        language=_languages(header.get("language")),
        gguf_file=_text(gguf.get("file")),
        gguf_sha256=_text(gguf.get("sha256")),
    )


def hub_id(spec: str, commit: str | None) -> str | None:
    """`user/name` for a model of the Hub or the demo, None for one from this disk (it has no commit)."""
    if spec == DEMO:
        return DEMO_HUB_ID
    if commit is None:
        return None
    found = "/".join(spec.split("/")[:2]) if spec.endswith(".gguf") else spec
    return found if _HUB_ID.fullmatch(found) else None


def base_model_of(recipe: dict[str, Any]) -> str | None:
    """`hub_id` of a recipe.json."""
    return hub_id(recipe["model"], recipe.get("model_commit"))


def hub_dataset(source: str | None) -> tuple[str, str | None] | None:
    """Id and configuration of a dataset on the Hub; None for a file, whose name ends in its kind, and for no source."""
    name, _, config = (source or "").partition(":")
    if not _HUB_ID.fullmatch(name) or name.lower().endswith(_TEXT_FILES):
        return None
    if not config:
        return name, None
    return (name, config) if _CONFIG.fullmatch(config) else None


def public_name(source: str) -> str:
    """What others may read of a text's source: a dataset's id, `bundled:...`, or a file's name without its folders."""
    return source if hub_dataset(source) else last_part(source)


def without_local_folders(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe.json with paths of this disk cut to their last part: nobody else needs the author's folders."""
    public = recipe | {key: public_name(recipe[key]) for key in ("dataset", "eval_dataset") if recipe.get(key)}
    return public if base_model_of(recipe) else public | {"model": last_part(recipe["model"])}


def last_part(path: str) -> str:
    """A file's or folder's name without what is above it, on any system."""
    return PureWindowsPath(path).name or path


def model_name(spec: str, base_model: str | None) -> str:
    """What people call the model: the last part of its id or path."""
    name = (base_model or spec).rstrip("/\\").rpartition("/")[2]
    return name.removesuffix(".gguf") or spec


def _license(stated: Any, license_file: Path | None) -> tuple[str | None, str | None]:
    """The Hub's identifier, and the licence's own name where the Hub has none for it."""
    stated = stated[0] if isinstance(stated, list) and stated else stated
    if text := _text(stated):
        identifier = text.strip().lower()
        return (identifier, None) if identifier in HUB_LICENSES else ("other", slug(identifier))
    if license_file is None:
        return None, None
    text = license_file.read_text(encoding="utf-8", errors="replace").strip()
    title = text.partition("\n")[0].strip().lower().removeprefix("the ")
    known = (identifier for start, identifier in _LICENSE_TITLES.items() if title.startswith(start))
    identifier = next(known, "other")
    return identifier, "see-license-file" if identifier == "other" else None


def _link(stated: Any, license_file: Path | None) -> str | None:
    text = _text(stated)
    if text and text.startswith(("https://", "http://")):
        return text
    return license_file.name if license_file else None


def _languages(stated: Any) -> tuple[str, ...]:
    codes = stated if isinstance(stated, list) else [stated]
    return tuple(code for code in codes if is_language(code))


def is_language(code: Any) -> bool:
    """Is it a code as the Hub's?"""
    return isinstance(code, str) and _LANGUAGE.fullmatch(code) is not None


def _readme_header(path: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception:  # missing, not UTF-8, or a header that is no YAML: a licence is then not stated there
        return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def slug(text: str) -> str:
    """A licence's name as a card may have it: at most 96 small letters, digits, `.` and `-`."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")[:96] or "unnamed"
