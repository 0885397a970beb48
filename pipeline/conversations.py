"""Instruction data as token ids with the answers marked: what a finetuning is asked to say, and after what.

    documents -> turns, through the model's chat template -> token ids, each told to be an answer's or not

A conversation is tokenized piece by piece, prompt and answer apart, as it is when the model answers. Answers are the
assistant's turns with the mark that ends them; nothing else is learnt (QLoRA, arXiv:2305.14314, trains on the
target alone). Plain text is learnt as a whole, in windows.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.calibration import rendered
from pipeline.documents import Document, Messages, read_documents
from pipeline.errors import CalibrationError
from pipeline.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.progress import Progress

Piece = tuple[list[int], bool]  # token ids, and whether they are an answer's


@dataclass(frozen=True, eq=False)
class Example:
    """One conversation or one window of text.

    Attributes:
        tokens: int64 [length], two or more.
        is_answer: bool [length]; false for the first token, which nothing predicts.
    """

    tokens: Tensor
    is_answer: Tensor


@dataclass(frozen=True, eq=False)
class Examples:
    """What is learnt, in the order of the source; `len()` counts the examples.

    Attributes:
        source: file name or dataset id.
        revision: the dataset's commit on the Hub; None for files.
        num_without_answer: conversations that were left out since there is nothing to learn in them.
        num_too_long: conversations that were left out since they have more tokens than `seq_len`.
        sha256: of all tokens and marks.
    """

    items: tuple[Example, ...]
    source: str
    revision: str | None
    num_without_answer: int
    num_too_long: int

    def __len__(self) -> int:
        return len(self.items)

    @property
    def sha256(self) -> str:
        """Of every example's length, tokens and marks, the numbers as little-endian int64."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(len(item.tokens).to_bytes(8, "little"))
            digest.update(item.tokens.numpy().astype("<i8").tobytes() + item.is_answer.numpy().tobytes())
        return digest.hexdigest()


def read_examples(
    source: str | None,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seq_len: int,
    most_rows: int,
    revision: str | None,
    progress: "Progress",
) -> Examples:
    """The first `most_rows` documents of a source, see documents.py for the kinds of rows.

    What has no answer or is longer than `seq_len` tokens is left out, counted, and said.

    Args:
        source: a .txt, .jsonl or .parquet file, a dataset on the Hub, or None for the bundled instructions.
    Raises:
        CalibrationError: the source cannot be read, or fewer than two examples are left.
    """
    documents = read_documents(source, split="train", revision=revision, default="instructions", keep_empty=True)
    items: list[Example] = []
    num_without_answer = num_too_long = 0
    with quiet_transformers():  # or it would warn of texts that are longer than the model's context
        for document in islice(documents.documents, most_rows):
            for pieces in _pieces_of(document, tokenizer, seq_len):
                example = _example(pieces)
                if not example.is_answer.any():
                    num_without_answer += 1
                elif len(example.tokens) > seq_len:
                    num_too_long += 1
                else:
                    items.append(example)
    found = Examples(tuple(items), documents.source, documents.revision, num_without_answer, num_too_long)
    left_out = (
        f"{num_without_answer} without an answer and {num_too_long} of more than {seq_len} tokens (--seq-len) were "
        "left out"
    )
    if len(found) < 2:
        raise CalibrationError(
            f"{found.source} leaves {len(found)} example{'' if len(found) == 1 else 's'} to learn from, but at least "
            f"two are needed: one is held out to measure on. {left_out.capitalize()}. Give more rows, or a larger "
            "--seq-len."
        )
    if num_without_answer or num_too_long:
        progress.say(f"Of {found.source}, {left_out}; {len(found)} examples are used.")
    return found


def _pieces_of(document: Document, tokenizer: "PreTrainedTokenizerBase", seq_len: int) -> Iterator[list[Piece]]:
    if not isinstance(document, str):
        yield _conversation(document, tokenizer)
        return
    ids = tokenizer(document).input_ids if document.strip() else []
    windows = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
    for window in windows or [[]]:
        yield [(window, True)]


def _example(pieces: Iterable[Piece]) -> Example:
    """Pieces put together; an answer of no tokens, or one that is the very first token, has nothing to learn."""
    ids, marks = [], []
    for some, is_answer in pieces:
        ids += some
        marks += [is_answer] * len(some)
    answers = torch.tensor(marks, dtype=torch.bool)
    answers[:1] = False
    return Example(torch.tensor(ids, dtype=torch.int64), answers)


def _conversation(messages: Messages, tokenizer: "PreTrainedTokenizerBase") -> list[Piece]:
    """Up to the last answer; what follows it cannot be learnt from."""
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not any(messages[place]["content"].strip() for place in answers):
        return []
    split = _by_template if tokenizer.chat_template is not None else _by_paragraphs
    return split(messages, answers, tokenizer)


def _by_template(messages: Messages, answers: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[Piece]:
    pieces: list[Piece] = []
    done = ""
    for place in answers:
        after = rendered(messages[: place + 1], tokenizer)
        asked = (rendered(messages[:place], tokenizer, asks=asks) for asks in (True, False))
        before = next((text for text in asked if text.startswith(done) and after.startswith(text)), None)
        if before is None:
            raise CalibrationError(
                "The model's chat template writes earlier turns anew when another one follows, so its answers cannot "
                "be told apart. Give conversations with one answer each."
            )
        pieces += [(_ids(before[len(done) :], tokenizer), False), (_ids(after[len(before) :], tokenizer), True)]
        done = after
    return pieces


def _by_paragraphs(messages: Messages, answers: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[Piece]:
    """Without a template: turns as paragraphs, and the end of the text after the last answer."""
    whole = tokenizer("a").input_ids
    starts = tokenizer.bos_token_id is not None and whole[0] == tokenizer.bos_token_id
    pieces: list[Piece] = [([tokenizer.bos_token_id], False)] if starts else []
    for place, message in enumerate(messages[: answers[-1] + 1]):
        is_last = place == answers[-1]
        ids = _ids(message["content"] + ("" if is_last else "\n\n"), tokenizer)
        if is_last and tokenizer.eos_token_id is not None:
            ids = [*ids, tokenizer.eos_token_id]
        pieces.append((ids, place in answers))
    return pieces


def _ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
