"""Instruction data as token ids with the answers marked: what a finetuning is asked to say, and after what.

    documents -> turns, through the model's chat template -> token ids, each told to be an answer's or not

A conversation is rendered and tokenized as a whole. Answers are the assistant's turns with the mark that ends them, but
not with the header that the template puts before them; nothing else is learnt (QLoRA, arXiv:2305.14314, trains on the
target alone). Plain text is learnt as a whole, in windows.
"""

import hashlib
from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.calibration import rendered
from pipeline.documents import Document, Messages, read_instructions
from pipeline.errors import CalibrationError
from pipeline.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.progress import Progress

Piece = tuple[str, bool]  # a text, and whether it is an answer's


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
        num_refused: conversations that were left out since the chat template refuses them, or answers cannot be told.
        sha256: of all tokens and marks.
    """

    items: tuple[Example, ...]
    source: str
    revision: str | None
    num_without_answer: int
    num_too_long: int
    num_refused: int

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

    What has no answer, has more than `seq_len` tokens, or is refused by the chat template is left out, counted, and
    said.

    Args:
        source: a .txt, .jsonl or .parquet file, a dataset on the Hub, or None for the bundled instructions.
    Raises:
        CalibrationError: the source cannot be read, or fewer than two examples are left.
    """
    documents = read_instructions(source, revision=revision)
    items: list[Example] = []
    num_without_answer = num_too_long = 0
    refusals: list[str] = []
    with quiet_transformers():  # or it would warn of texts that are longer than the model's context
        for document in islice(documents.documents, most_rows):
            try:
                examples = _examples_of(document, tokenizer, seq_len)
            except CalibrationError as error:
                refusals.append(str(error).removesuffix("."))
                continue
            for example in examples:
                if not example.is_answer.any():
                    num_without_answer += 1
                elif len(example.tokens) > seq_len:
                    num_too_long += 1
                else:
                    items.append(example)
    found = Examples(
        tuple(items), documents.source, documents.revision, num_without_answer, num_too_long, len(refusals)
    )
    left_out = f"{num_without_answer} without an answer and {num_too_long} of more than {seq_len} tokens (--seq-len)"
    if refusals:
        left_out += f", and {len(refusals)} for this reason or one like it: {refusals[0]}"
    if len(found) < 2:
        raise CalibrationError(
            f"{found.source} leaves {len(found)} example{'' if len(found) == 1 else 's'} to learn from, but at least "
            f"two are needed: one is held out to measure on. Left out were {left_out}. Give more rows, or a larger "
            "--seq-len."
        )
    if num_without_answer or num_too_long or refusals:
        progress.say(f"Of {found.source}, {len(found)} examples are used. Left out were {left_out}.")
    return found


def _examples_of(document: Document, tokenizer: "PreTrainedTokenizerBase", seq_len: int) -> list[Example]:
    if not isinstance(document, str):
        pieces = _conversation(document, tokenizer)
        return [_tokenized(pieces, tokenizer)]
    ids = torch.tensor(tokenizer(document).input_ids if document.strip() else [], dtype=torch.int64)
    return [_example(window, torch.ones_like(window, dtype=torch.bool)) for window in ids.split(seq_len)]


def _example(tokens: Tensor, is_answer: Tensor) -> Example:
    """The very first token, which nothing predicts, is never an answer's."""
    return Example(tokens, torch.cat([torch.zeros_like(is_answer[:1]), is_answer[1:]]))


def _tokenized(pieces: list[Piece], tokenizer: "PreTrainedTokenizerBase") -> Example:
    """One text after the other; a token that begins in an answer is the answer's."""
    ids: list[int] = []
    marks: list[bool] = []
    if tokenizer.is_fast:
        text, ends = "".join(piece for piece, _ in pieces), list(accumulate(len(piece) for piece, _ in pieces))
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(found.input_ids)
        marks = [pieces[min(bisect(ends, start), len(pieces) - 1)][1] for start, _ in found["offset_mapping"]]
    else:
        for piece, is_answer in pieces:
            some = tokenizer(piece, add_special_tokens=False).input_ids
            ids, marks = [*ids, *some], [*marks, *[is_answer] * len(some)]
    return _example(torch.tensor(ids, dtype=torch.int64), torch.tensor(marks, dtype=torch.bool))


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
        asked = (rendered(messages[:place], tokenizer, asks=asks) if place else "" for asks in (True, False))
        before = next((text for text in asked if text.startswith(done) and after.startswith(text)), None)
        start = -1 if before is None else after.find(messages[place]["content"].strip(), len(before))
        if before is None or start < 0:
            raise CalibrationError(
                "the model's chat template writes earlier turns anew when another one follows, or changes an answer, "
                "so that answers cannot be told apart; conversations with one answer each may do"
            )
        pieces += [(after[len(done) : start], False), (after[start:], True)]
        done = after
    return pieces


def _by_paragraphs(messages: Messages, answers: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[Piece]:
    """Without a template: turns as paragraphs, with the marks of the tokenizer for beginning and end of a text."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    starts = bos is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    pieces: list[Piece] = [(str(bos), False)] if starts else []
    for place, message in enumerate(messages[: answers[-1] + 1]):
        end = (eos or "") if place == answers[-1] else "\n\n"
        pieces.append((f"{message['content']}{end}", place in answers))
    return pieces
