"""Where text comes from, and what counts as one document.

A .txt file is one document. A .jsonl or .parquet file and a dataset on the Hub (user/name, user/name:config)
have one document a row, in the first of these fields that is there:

    text                                               plain
    messages, conversations                            a chat: {role, content} or {from, value}
    instruction (input) output, prompt completion,
    question answer                                    a chat of two turns
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import CalibrationError
from pipeline.home import expanded
from pipeline.hub_failures import hub_failures
from pipeline.quiet import first_line
from registry.hub_client import limit_waits

Messages = list[dict[str, str]]
Document = str | Messages
Row = Mapping[str, Any]
DefaultText = Literal["calibration", "evaluation"]

CHAT_FIELDS = ("messages", "conversations")
TURN_FIELDS = (("instruction", "output"), ("prompt", "completion"), ("question", "answer"))
# ShareGPT's names -> the names that chat templates know
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True)
class Documents:
    """The non-empty documents of a source, read when asked for; its name; its commit on the Hub."""

    documents: Iterator[Document]
    source: str
    revision: str | None


def read_documents(source: str | None, *, split: str, revision: str | None, default: DefaultText) -> Documents:
    """All documents of a file, of a Hub dataset, or of the bundled text (`source` None).

    Raises:
        CalibrationError: missing, unreadable, of an unknown kind or shape, or without any text.
    """
    if source is None:
        text = (resources.files("pipeline") / "data" / f"{default}.txt").read_text(encoding="utf-8")
        return Documents(iter((text,)), f"bundled:{default}.txt", None)
    found = _documents(source, split, revision, prepared=lambda row: row)
    return replace(found, documents=_nonempty(source, found.documents))


def read_instructions(source: str | None, *, revision: str | None) -> Documents:
    """All documents, those without text too; of a row with a chat and a text, the chat, and nothing for what is null.

    Args:
        source: a file, a Hub dataset, or None for the bundled instructions.
    Raises:
        CalibrationError: missing, unreadable, or of an unknown kind or shape.
    """
    if source is None:
        with resources.as_file(resources.files("pipeline") / "data" / "instructions.jsonl") as path:
            return Documents(iter(list(_file_documents(path, _instruction))), "bundled:instructions.jsonl", None)
    return _documents(source, "train", revision, prepared=_instruction)


def _documents(source: str, split: str, revision: str | None, prepared: Callable[[Row], Row]) -> Documents:
    path = expanded(source)
    if path.is_file():
        return Documents(_file_documents(path, prepared), path.name, None)
    if not _HUB_ID.fullmatch(source) or path.is_dir() or path.suffix in SUFFIXES:
        raise CalibrationError(
            f"No text file at {source}. Give a .txt, .jsonl or .parquet file (a path is taken relative to "
            "the current folder), or a dataset on the Hub as user/name or user/name:config."
        )
    hub = _hub_rows(source, split, revision)
    return Documents(_row_documents(source, map(prepared, hub.rows)), source, hub.commit)


def _file_documents(path: Path, prepared: Callable[[Row], Row]) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise CalibrationError(
            f"{path} has the unknown suffix {path.suffix!r}: expected {', '.join(SUFFIXES)}. Rename or "
            "convert it; a file of any other kind would be read as something that it is not."
        )
    if suffix == ".txt":
        return _text_documents(path)
    return _row_documents(str(path), map(prepared, ROW_READERS[suffix](path)))


def _instruction(row: Row) -> Row:
    """A row without its text where it has a chat too, and with nothing in the place of null."""
    row = {key: "" if value is None else value for key, value in row.items()}
    for field in CHAT_FIELDS:
        if isinstance(row.get(field), list):
            row[field] = [_without_nulls(turn) for turn in row[field]]
    is_chat = any(field in row for field in CHAT_FIELDS) or any({*pair} <= row.keys() for pair in TURN_FIELDS)
    return {key: value for key, value in row.items() if key != "text"} if is_chat else row


def _without_nulls(turn: Any) -> Any:
    return {key: "" if value is None else value for key, value in turn.items()} if isinstance(turn, dict) else turn


def _text_documents(path: Path) -> Iterator[Document]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 ({error}). Convert it: iconv -t UTF-8.") from error


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CalibrationError(
                    f"{path}, line {number} is not JSON ({error}). Expected one JSON object a line; mend or "
                    "delete that line."
                ) from error
            if not isinstance(row, dict):
                raise CalibrationError(
                    f"{path}, line {number} is a JSON {type(row).__name__}, but expected one object a line, "
                    'such as {"text": "..."}.'
                )
            yield row


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise CalibrationError(
            f"{path} is not a readable parquet file ({error}). It is damaged or cut off: fetch it again."
        ) from error


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
ROW_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
SUFFIXES = (".txt", *ROW_READERS)


@dataclass(frozen=True)
class _HubRows:
    rows: Iterator[Row]
    commit: str


def _hub_rows(source: str, split: str, revision: str | None) -> _HubRows:
    """A split's rows at one commit: streamed, or from the local cache where the Hub is switched off."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    limit_waits()
    dataset_id, _, config = source.partition(":")
    offline = is_offline_mode()
    with _hub_errors(source, split):
        if offline and revision:
            commit = revision
        else:
            commit = str(HfApi().dataset_info(dataset_id, revision=revision, timeout=10).sha)
        rows = datasets.load_dataset(dataset_id, config or None, split=split, revision=commit, streaming=not offline)
    return _HubRows(_guarded(rows, source, split), commit)


def _guarded(rows: Iterable[Row], source: str, split: str) -> Iterator[Row]:
    with _hub_errors(source, split):
        yield from rows


@contextmanager
def _hub_errors(source: str, split: str) -> Iterator[None]:
    import datasets

    try:
        yield
    except hub_failures(ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise CalibrationError(
            f"No text from {source}, split {split!r}: there is no such file here, and the Hub's dataset "
            f"could not be loaded ({type(error).__name__}: {first_line(error)}). Check id, config, split and "
            "connection; offline, a cached dataset needs its revision. Without a dataset the bundled text is "
            "used."
        ) from error


def _row_documents(source: str, rows: Iterable[Row]) -> Iterator[Document]:
    for number, row in enumerate(rows, start=1):
        yield _row_document(source, number, row)


def _row_document(source: str, number: int, row: Row) -> Document:
    """One row as text or as a chat; `number` counts rows from 1 for error messages."""
    if "text" in row and (row["text"] is None or isinstance(row["text"], str)):
        return _whole(row["text"] or "")
    for field in CHAT_FIELDS:
        if row.get(field) is not None:
            return _messages(source, number, row[field])
    for question, answer in TURN_FIELDS:
        more = row.get("input")
        if isinstance(row.get(question), str) and isinstance(row.get(answer), str):
            if not (more is None or isinstance(more, str)):
                raise CalibrationError(
                    f"{source}, row {number} has an `input` that is a {type(more).__name__}. Expected a string or null."
                )
            asked = "\n\n".join(filter(None, [row[question], more]))
            return [{"role": "user", "content": _whole(asked)}, {"role": "assistant", "content": _whole(row[answer])}]
    known = {"text", *(name for pair in TURN_FIELDS if {*pair} <= row.keys() for name in pair)}
    for field in sorted(known & row.keys()):
        if not isinstance(row[field], str):
            raise CalibrationError(
                f"{source}, row {number} has a `{field}` that is a {type(row[field]).__name__}. Expected a string."
            )
    pairs = ", ".join(f"{question}/{answer}" for question, answer in TURN_FIELDS)
    raise CalibrationError(
        f"{source}, row {number} has none of the known fields: text, {', '.join(CHAT_FIELDS)}, {pairs}. "
        f"Found: {', '.join(sorted(row)) or 'no field at all'}. Rename the field with the text to `text`."
    )


def _messages(source: str, number: int, turns: Any) -> Messages:
    try:
        messages = [
            {"role": turn["role"], "content": turn["content"]}
            if "role" in turn
            else {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
            for turn in turns
        ]
        if not all(isinstance(message["content"], str) for message in messages):
            raise TypeError("a content that is not a string")
    except (KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(
            f"{source}, row {number} is not a conversation that can be read ({error}). Expected a list of "
            '{"role": ..., "content": ...} or {"from": ..., "value": ...} with strings.'
        ) from error
    return [message | {"content": _whole(message["content"])} for message in messages]


def _whole(text: str) -> str:
    """Without halves of characters (JSON may hold a lone surrogate), which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _nonempty(source: str, documents: Iterable[Document]) -> Iterator[Document]:
    empty = True
    for document in documents:
        if _has_text(document):
            empty = False
            yield document
    if empty:
        raise CalibrationError(f"{source} holds no text. Give a file or a dataset with some.")


def _has_text(document: Document) -> bool:
    if isinstance(document, str):
        return bool(document.strip())
    return any(message["content"].strip() for message in document)
