"""Text as windows of exactly `seq_len` tokens, for calibration and for evaluation.

    source -> documents -> token ids -> one stream -> non-overlapping windows -> [windows, seq_len], sha256

A plain text file is one document, as in the GPTQ protocol. Conversations go through the model's own chat
template. The hash is of the tokens themselves: two runs with the same hash have seen the same numbers.
"""

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.documents import DefaultText, Document, Messages, read_documents
from pipeline.errors import CalibrationError
from pipeline.quiet import quiet_transformers

# a draw is from the first documents that make this many times the tokens asked for: a source may be endless
POOL_FACTOR = 64

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenWindows:
    """Token windows and where they come from.

    Attributes:
        tokens: int64 [windows, seq_len]; `len()` counts the windows, which may be fewer than asked for.
        sha256: of windows and seq_len as two little-endian int64, then the tokens as little-endian int64.
        source: file name or dataset id; `bundled:calibration.txt` for the default text.
        revision: the dataset's commit on the Hub; None for files.
        num_documents: documents in the source that were tokenized.
    """

    tokens: Tensor
    sha256: str
    source: str
    revision: str | None
    num_documents: int

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class _Stream:
    tokens: np.ndarray  # int64 [tokens]
    num_documents: int


def token_windows(
    source: str | None,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    num_windows: int,
    seq_len: int,
    seed: int | None,
    split: str = "train",
    revision: str | None = None,
    default: DefaultText = "calibration",
    ends: tuple[int, int] | None = None,
) -> TokenWindows:
    """Cut a text into windows and choose `num_windows` of them, or all if there are fewer.

    Args:
        source: a .txt, .jsonl or .parquet file, a dataset on the Hub as `user/name` or `user/name:config`,
            or None for the bundled text.
        seed: draws windows without replacement, in drawn order, from the first documents with `POOL_FACTOR`
            times as many tokens; None takes the first windows in order.
        split: of a dataset on the Hub.
        revision: of a dataset on the Hub; without one, today's commit is looked up and recorded.
        default: which bundled text None stands for.
        ends: ids that stand before and after the text of every window, and count as two of its tokens.
    Raises:
        CalibrationError: the source cannot be read, holds no text, or less than one window of it.
    """
    if seq_len < 2:
        raise CalibrationError(
            f"A window of {seq_len} tokens predicts nothing: --seq-len must be 2 or more, for example 512."
        )
    if num_windows < 1:
        raise CalibrationError(f"{num_windows} windows were asked for: give at least 1, for example 64.")
    text_len = seq_len - len(ends or ())
    if text_len < 1:
        raise CalibrationError(f"A window of {seq_len} tokens has no room for text: give --seq-len 3 or more.")
    documents = read_documents(source, split=split, revision=revision, default=default)
    pool = num_windows * text_len * (1 if seed is None else POOL_FACTOR)
    stream = _tokenize(documents.documents, tokenizer, pool, has_ends=ends is not None)
    num_there = len(stream.tokens) // text_len
    if num_there == 0:
        raise CalibrationError(
            f"{documents.source} has {len(stream.tokens)} tokens, but one window needs {seq_len}. Give more "
            "text, or a smaller --seq-len (--eval-seq-len where it is the evaluation's)."
        )
    windows = torch.from_numpy(stream.tokens[: num_there * text_len].reshape(num_there, text_len))
    tokens = windows[_choose(num_there, num_windows, seed)].clone()
    if ends is not None:
        first, last = (torch.full_like(tokens[:, :1], end) for end in ends)
        tokens = torch.cat([first, tokens, last], dim=1)
    return TokenWindows(
        tokens=tokens,
        sha256=tokens_sha256(tokens),
        source=documents.source,
        revision=documents.revision,
        num_documents=stream.num_documents,
    )


def tokens_sha256(tokens: Tensor) -> str:
    """sha256 of the shape and the tokens, both as little-endian int64; the same on every machine."""
    data = np.ascontiguousarray(tokens.cpu().numpy(), dtype="<i8")
    return hashlib.sha256(struct.pack(f"<{data.ndim}q", *data.shape) + data.tobytes()).hexdigest()


def check_fits(windows: TokenWindows, vocab_size: int, num_positions: int | None) -> None:
    """Raise `CalibrationError` if a model with so many token ids and positions (None: any number) cannot read them."""
    seq_len = windows.tokens.shape[1]
    if num_positions is not None and seq_len > num_positions:
        raise CalibrationError(
            f"Windows of {seq_len} tokens are longer than the {num_positions} positions that this model knows. Give "
            f"shorter windows, of at most {num_positions} (--seq-len; of a compression also --eval-seq-len)."
        )
    largest = int(windows.tokens.max())
    if largest >= vocab_size:
        raise CalibrationError(
            f"Token id {largest} from {windows.source} is beyond the model's vocabulary of {vocab_size}: the "
            "tokenizer does not belong to this model. Put the model's own tokenizer files into its folder."
        )


def _choose(num_there: int, num_windows: int, seed: int | None) -> Tensor:
    if seed is None:
        return torch.arange(min(num_there, num_windows))
    return torch.randperm(num_there, generator=torch.Generator().manual_seed(seed))[:num_windows]


def _tokenize(
    documents: Iterable[Document], tokenizer: "PreTrainedTokenizerBase", num_tokens_wanted: int, *, has_ends: bool
) -> _Stream:
    """Tokenize until there are `num_tokens_wanted`, and no document more.

    Plain texts get what the tokenizer adds (BOS, once a document) unless the windows get it; rendered chats have it
    already.
    """
    streams, num_tokens = [np.empty(0, dtype=np.int64)], 0
    with quiet_transformers():  # or it would warn that a whole text is longer than the model's context
        for document in documents:
            streams.append(np.asarray(_document_ids(document, tokenizer, not has_ends), dtype=np.int64))
            num_tokens += len(streams[-1])
            if num_tokens >= num_tokens_wanted:
                break
    return _Stream(np.concatenate(streams), num_documents=len(streams) - 1)


def _document_ids(document: Document, tokenizer: "PreTrainedTokenizerBase", adds_special: bool) -> Iterable[int]:
    if isinstance(document, str):
        return tokenizer(document, add_special_tokens=adds_special).input_ids
    if tokenizer.chat_template is None:
        text = "\n\n".join(message["content"] for message in document)
        return tokenizer(text, add_special_tokens=adds_special).input_ids
    return tokenizer(rendered(document, tokenizer), add_special_tokens=False).input_ids


def rendered(messages: Messages, tokenizer: "PreTrainedTokenizerBase", *, asks: bool = False) -> str:
    """A conversation through the model's chat template; `asks` adds what makes the model answer.

    Raises:
        CalibrationError: the template refuses it.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    except Exception as error:  # a template is a foreign program and raises what it likes
        raise CalibrationError(
            f"The model's chat template refuses a conversation with the roles "
            f"{[message['role'] for message in messages]}: {error}. Mend the data, or use plain text."
        ) from error
    assert isinstance(text, str)
    return text
