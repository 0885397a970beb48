"""Text to tokens: nothing lost, nothing doubled, the same numbers every time, clear words when it fails."""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from pipeline.calibration import POOL_FACTOR, TokenWindows, check_fits, token_windows, tokens_sha256
from pipeline.errors import CalibrationError
from tests.models import VOCAB_SIZE, build_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, 42 times.\n" * 40
CHAT = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4, of course."}]
RENDERED = "<s><|turn|>user\nWhat is 2+2?</s><|turn|>assistant\n4, of course.</s>"


@pytest.fixture(scope="module")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama's: it puts BOS before every text by itself."""
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    assert tokenizer("a").input_ids[0] == 0
    return tokenizer


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def write_rows(path: Path, *rows: Any) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def first_window(source: str, tokenizer: PreTrainedTokenizerFast, seq_len: int, **kwargs: Any) -> list[int]:
    windows = token_windows(source, tokenizer, num_windows=1, seq_len=seq_len, seed=None, **kwargs)
    return windows.tokens[0].tolist()


def message_of(source: str | None, tokenizer: PreTrainedTokenizerFast, **kwargs: Any) -> str:
    settings = {"num_windows": 2, "seq_len": 8, "seed": 0} | kwargs
    with pytest.raises(CalibrationError) as caught:
        token_windows(source, tokenizer, **settings)
    message = str(caught.value)
    assert "\n" not in message, "one paragraph"
    return message


# --- tokens ---


def test_windows_are_the_stream_cut_up(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tiny_tokenizer(TEXT).input_ids
    source = write(tmp_path / "a.txt", TEXT)
    windows = token_windows(source, tiny_tokenizer, num_windows=10_000, seq_len=32, seed=None)
    assert windows.tokens.dtype == torch.int64
    assert len(windows) == len(ids) // 32 < 10_000
    assert windows.tokens.flatten().tolist() == ids[: len(windows) * 32]
    assert (windows.source, windows.revision, windows.num_documents) == ("a.txt", None, 1)


def test_unseeded_windows_come_first_in_order(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "a.txt", TEXT)
    windows = token_windows(source, tiny_tokenizer, num_windows=3, seq_len=16, seed=None)
    assert windows.tokens.flatten().tolist() == tiny_tokenizer(TEXT).input_ids[:48]


def test_seeded_windows_are_distinct_windows(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "a.txt", " ".join(str(number) for number in range(2_000)))
    ordered = token_windows(source, tiny_tokenizer, num_windows=10_000, seq_len=16, seed=None).tokens.tolist()
    drawn = token_windows(source, tiny_tokenizer, num_windows=20, seq_len=16, seed=7).tokens.tolist()
    places = [ordered.index(window) for window in drawn]
    assert len(set(places)) == 20
    assert places != sorted(places)
    other = token_windows(source, tiny_tokenizer, num_windows=20, seq_len=16, seed=8).tokens.tolist()
    assert other != drawn


def test_drawing_leaves_the_global_generator_alone(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "a.txt", TEXT)
    torch.manual_seed(1)
    first = token_windows(source, tiny_tokenizer, num_windows=5, seq_len=16, seed=0)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(2)
    again = token_windows(source, tiny_tokenizer, num_windows=5, seq_len=16, seed=0)
    assert again.sha256 == first.sha256


def test_hash_is_of_shape_and_little_endian_tokens() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 600]])
    expected = hashlib.sha256(struct.pack("<8q", 2, 3, 1, 2, 3, 4, 5, 600)).hexdigest()
    assert tokens_sha256(tokens) == expected
    assert tokens_sha256(tokens.T.contiguous().T) == expected
    assert tokens_sha256(tokens.reshape(3, 2)) != expected


def test_bundled_texts_differ_and_are_named(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    settings: dict[str, Any] = {"num_windows": 2, "seq_len": 64, "seed": None}
    calibration = token_windows(None, tiny_tokenizer, **settings)
    evaluation = token_windows(None, tiny_tokenizer, **settings, default="evaluation")
    assert calibration.source == "bundled:calibration.txt"
    assert evaluation.source == "bundled:evaluation.txt"
    assert calibration.sha256 != evaluation.sha256


def test_the_bundled_megabyte_says_nothing(tiny_model_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 256
    token_windows(None, tokenizer, num_windows=10**6, seq_len=512, seed=0)
    captured = capfd.readouterr()
    assert "longer than" not in captured.out + captured.err


# --- one BOS a document ---


def test_plain_text_gets_what_the_tokenizer_adds_once(tmp_path: Path, bos_tokenizer: PreTrainedTokenizerFast) -> None:
    windows = token_windows(write(tmp_path / "a.txt", TEXT), bos_tokenizer, num_windows=99, seq_len=8, seed=None)
    assert (windows.tokens == 0).sum() == 1
    assert windows.tokens[0, 0] == 0
    rows = write_rows(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    ids = [*bos_tokenizer("one").input_ids, *bos_tokenizer("two").input_ids]
    assert first_window(rows, bos_tokenizer, len(ids)) == ids


def test_chat_template_is_used_without_a_second_bos(tmp_path: Path, bos_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = bos_tokenizer(RENDERED, add_special_tokens=False).input_ids
    source = write_rows(tmp_path / "a.jsonl", {"messages": CHAT})
    assert first_window(source, bos_tokenizer, len(ids)) == ids
    assert ids.count(0) == 1


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": [
                {"from": "human", "value": "What is 2+2?"},
                {"from": "gpt", "value": "4, of course."},
            ]
        },
        {"instruction": "What is 2+2?", "output": "4, of course."},
        {"instruction": "What is 2+2?", "input": "", "output": "4, of course."},
        {"prompt": "What is 2+2?", "completion": "4, of course."},
        {"question": "What is 2+2?", "answer": "4, of course."},
    ],
    ids=["conversations", "instruction", "empty input", "prompt", "question"],
)
def test_other_spellings_of_a_chat(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]
) -> None:
    ids = tiny_tokenizer(RENDERED, add_special_tokens=False).input_ids
    assert first_window(write_rows(tmp_path / "a.jsonl", row), tiny_tokenizer, len(ids)) == ids


def test_instruction_with_input(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_rows(tmp_path / "a.jsonl", {"instruction": "Add.", "input": "2, 2", "output": "4"})
    text = "<s><|turn|>user\nAdd.\n\n2, 2</s><|turn|>assistant\n4</s>"
    ids = tiny_tokenizer(text, add_special_tokens=False).input_ids
    assert first_window(source, tiny_tokenizer, len(ids)) == ids


def test_half_of_a_character_is_replaced(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "a.jsonl", '{"text": "hello \\ud83d world"}\n')
    ids = tiny_tokenizer("hello ? world").input_ids
    assert first_window(source, tiny_tokenizer, len(ids)) == ids


def test_an_input_that_is_no_text_is_named(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_rows(tmp_path / "a.jsonl", {"instruction": "Say it", "input": {"a": 1}, "output": "hello"})
    assert "row 1 has an `input` that is a dict" in message_of(source, tiny_tokenizer)


@pytest.mark.parametrize(("row", "field"), [({"question": "2 + 2", "answer": 4}, "answer"), ({"text": 4}, "text")])
def test_a_text_that_is_a_number_is_told(row: dict[str, object], field: str, tiny_tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(row))
    assert f"row 1 has a `{field}` that is a int. Expected a string" in message_of(source, tiny_tokenizer)


def test_chat_without_a_template_is_joined_plainly(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    ids = tokenizer("What is 2+2?\n\n4, of course.").input_ids
    assert first_window(write_rows(tmp_path / "a.jsonl", {"messages": CHAT}), tokenizer, len(ids)) == ids


def test_template_that_refuses(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    message = message_of(write_rows(tmp_path / "a.jsonl", {"messages": CHAT}), tokenizer)
    assert all(fact in message for fact in ("['user', 'assistant']", "no system role"))


# --- files ---


def test_parquet_equals_jsonl(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": TEXT}, {"text": "short"}, {"text": None}, {"text": "  "}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    settings: dict[str, Any] = {"num_windows": 999, "seq_len": 16, "seed": 3}
    from_parquet = token_windows(str(tmp_path / "a.parquet"), tiny_tokenizer, **settings)
    from_jsonl = token_windows(write_rows(tmp_path / "a.jsonl", *rows), tiny_tokenizer, **settings)
    assert from_parquet.sha256 == from_jsonl.sha256
    assert from_parquet.num_documents == from_jsonl.num_documents == 2


def test_parquet_of_chats(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": CHAT}]), tmp_path / "a.parquet")
    ids = tiny_tokenizer(RENDERED, add_special_tokens=False).input_ids
    assert first_window(str(tmp_path / "a.parquet"), tiny_tokenizer, len(ids)) == ids


def test_long_source_is_read_only_as_far_as_needed(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    num_tokens = len(tiny_tokenizer(TEXT).input_ids)
    source = write_rows(tmp_path / "a.jsonl", *[{"text": TEXT}] * (POOL_FACTOR + 10))
    drawn = token_windows(source, tiny_tokenizer, num_windows=1, seq_len=num_tokens, seed=0)
    assert drawn.num_documents == POOL_FACTOR
    assert token_windows(source, tiny_tokenizer, num_windows=1, seq_len=8, seed=None).num_documents == 1


# --- bad input ---


def test_shorter_than_one_window(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    num_tokens = len(tiny_tokenizer("just a few words").input_ids)
    source = write(tmp_path / "a.txt", "just a few words")
    message = message_of(source, tiny_tokenizer, seq_len=512)
    assert all(fact in message for fact in ("a.txt", f"{num_tokens} tokens", "needs 512", "--seq-len"))
    assert len(token_windows(source, tiny_tokenizer, num_windows=64, seq_len=num_tokens, seed=0)) == 1


@pytest.mark.parametrize("name", ["nothing.txt", "./nothing", "a/b/c", "/no/where.parquet"])
def test_missing_file(tiny_tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    message = message_of(name, tiny_tokenizer)
    assert f"No text file at {name}" in message
    assert ".jsonl" in message


def test_folder_is_no_text(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert "No text file at" in message_of(str(tmp_path), tiny_tokenizer)


def test_unknown_suffix(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    message = message_of(write(tmp_path / "a.csv", "text\nhello"), tiny_tokenizer)
    assert "'.csv'" in message
    assert ".txt, .jsonl, .parquet" in message


@pytest.mark.parametrize("content", ["", " \n\n"], ids=["empty", "blank"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_empty_text(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, suffix: str, content: str) -> None:
    assert "holds no text" in message_of(write(tmp_path / f"a{suffix}", content), tiny_tokenizer)


def test_text_that_is_not_utf8(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_bytes("Größe".encode("latin-1"))
    assert "not UTF-8" in message_of(str(tmp_path / "a.txt"), tiny_tokenizer)


@pytest.mark.parametrize(("line", "fact"), [('{"text": "cut', "line 3 is not JSON"), ("[1]", "line 3 is a JSON list")])
def test_malformed_line_is_numbered(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, line: str, fact: str
) -> None:
    source = write(tmp_path / "a.jsonl", f'{{"text": "fine"}}\n\n{line}\n')
    assert fact in message_of(source, tiny_tokenizer)


def test_unknown_fields_are_named(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_rows(tmp_path / "a.jsonl", {"text": "fine"}, {"body": "x", "author": "y"})
    message = message_of(source, tiny_tokenizer)
    assert all(fact in message for fact in ("row 2", "Found: author, body", "messages", "`text`"))


@pytest.mark.parametrize(
    "turns",
    ["text", [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": 3}], [None]],
    ids=str,
)
def test_broken_conversation(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, turns: Any) -> None:
    message = message_of(write_rows(tmp_path / "a.jsonl", {"messages": turns}), tiny_tokenizer)
    assert "row 1 is not a conversation" in message


def test_damaged_parquet(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert "not a readable parquet" in message_of(write(tmp_path / "a.parquet", "PAR1 no"), tiny_tokenizer)


@pytest.mark.parametrize("seq_len", [1, 0, -5])
def test_window_too_small(tiny_tokenizer: PreTrainedTokenizerFast, seq_len: int) -> None:
    assert "2 or more" in message_of(None, tiny_tokenizer, seq_len=seq_len)


def test_no_windows(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert "at least 1" in message_of(None, tiny_tokenizer, num_windows=0)


def test_vocabulary_is_checked() -> None:
    windows = TokenWindows(torch.tensor([[1, VOCAB_SIZE]]), "", "a.txt", None, 1)
    check_fits(windows, VOCAB_SIZE + 1, None)
    with pytest.raises(CalibrationError, match=rf"Token id {VOCAB_SIZE} from a\.txt .* {VOCAB_SIZE}:"):
        check_fits(windows, VOCAB_SIZE, None)


# --- the Hub ---


def test_dataset_id_when_offline(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    message = message_of("user/name", tiny_tokenizer)
    assert all(fact in message for fact in ("user/name", "no such file here", "bundled text"))


def test_dataset_when_the_hub_refuses_the_connection(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "ConnectError" in message_of("user/name", tiny_tokenizer)


def test_dataset_is_pinned_to_its_commit(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Iterator[dict[str, str]]:
        asked.append((args, kwargs))
        yield {"text": TEXT}
        raise AssertionError("read further than needed")

    def dataset_info(self: object, repo_id: str, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(sha=f"commit of {repo_id}@{kwargs['revision']}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    windows = token_windows(
        "user/name:en", tiny_tokenizer, num_windows=2, seq_len=16, seed=None, split="test", revision="main"
    )
    assert windows.revision == "commit of user/name@main"
    assert windows.source == "user/name:en"
    assert asked == [(("user/name", "en"), {"split": "test", "revision": windows.revision, "streaming": True})]
    assert np.array_equal(windows.tokens.flatten(), tiny_tokenizer(TEXT).input_ids[:32])


def test_dataset_that_breaks_off(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> Iterator[dict[str, str]]:
        yield {"text": "short"}
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = message_of("user/name", tiny_tokenizer, revision="abc", seq_len=500)
    assert "ConnectionError: gone" in message
