"""Instruction data: what is learnt of it, what is left out, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.make_instructions import TARGET, rows
from pipeline.conversations import Examples, read_examples
from pipeline.errors import CalibrationError
from pipeline.progress import SILENT

CHAT = [
    {"role": "user", "content": "what is the river"},
    {"role": "assistant", "content": "it is the old river"},
    {"role": "user", "content": "and the town"},
    {"role": "assistant", "content": "the town is old"},
]


class Said:
    """A progress that remembers what it was told to say."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        self.messages.append(message)


def written(folder: Path, *found: object) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in found))
    return str(path)


def read(source: str | None, tokenizer, progress=SILENT, **changes) -> Examples:
    settings = {"seq_len": 64, "most_rows": 100, "revision": None} | changes
    return read_examples(source, tokenizer, progress=progress, **settings)


def answers(examples: Examples, tokenizer) -> list[str]:
    return [tokenizer.decode(item.tokens[item.is_answer]) for item in examples.items]


def test_the_answers_alone_are_learnt_with_the_mark_that_ends_them(tmp_path: Path, tiny_tokenizer) -> None:
    examples = read(written(tmp_path, {"messages": CHAT}, {"messages": CHAT[:2]}), tiny_tokenizer)
    both, first = answers(examples, tiny_tokenizer)
    assert "it is the old river" in both
    assert "the town is old" in both
    assert "what is the river" not in both
    assert "user" not in both
    whole = tiny_tokenizer.apply_chat_template(CHAT[:2], tokenize=False)
    asked = tiny_tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(asked)
    assert first == whole.removeprefix(asked), "what the template ends a turn with is learnt too"


def test_a_prompt_has_the_tokens_that_it_has_when_the_model_is_asked(tmp_path: Path, tiny_tokenizer) -> None:
    (item, _) = read(written(tmp_path, {"messages": CHAT[:2]}, {"messages": CHAT}), tiny_tokenizer).items
    asked = tiny_tokenizer.apply_chat_template(
        CHAT[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert torch.equal(item.tokens[~item.is_answer], asked.input_ids[0])


def test_all_spellings_of_a_question_and_an_answer_are_the_same(tmp_path: Path, tiny_tokenizer) -> None:
    question, answer = CHAT[0]["content"], CHAT[1]["content"]
    spelled = [
        {"messages": CHAT[:2]},
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        {"instruction": question, "input": "", "output": answer},
        {"prompt": question, "completion": answer},
        {"question": question, "answer": answer},
    ]
    examples = read(written(tmp_path, *spelled), tiny_tokenizer)
    assert len({tuple(item.tokens.tolist()) for item in examples.items}) == 1
    assert len({tuple(item.is_answer.tolist()) for item in examples.items}) == 1


def test_without_a_template_turns_are_paragraphs_and_the_end_is_learnt(tmp_path: Path, tiny_tokenizer) -> None:
    from tests.models import build_tokenizer

    plain = build_tokenizer()
    plain.chat_template = None
    examples = read(written(tmp_path, {"messages": CHAT}, {"messages": CHAT[:2]}), plain)
    both, first = answers(examples, plain)
    assert first.replace(" ", "") == f"it is the old river{plain.eos_token or ''}".replace(" ", "")
    assert "it is the old river" in both
    assert "and the town" not in both


def test_plain_text_is_learnt_in_windows(tmp_path: Path, tiny_tokenizer) -> None:
    text = "the river was wide and the town was old " * 20
    examples = read(written(tmp_path, {"text": text}), tiny_tokenizer, seq_len=16)
    ids = tiny_tokenizer(text).input_ids
    assert len(examples) == -(-len(ids) // 16)
    assert torch.cat([item.tokens for item in examples.items]).tolist() == ids
    assert all(item.is_answer[1:].all() and not item.is_answer[0] for item in examples.items)


def test_rows_without_an_answer_and_long_ones_are_left_out_counted_and_said(tmp_path: Path, tiny_tokenizer) -> None:
    said = Said()
    found = [
        {"messages": CHAT[:2]},
        {"instruction": "say nothing", "output": "   "},
        {"messages": CHAT[:1]},
        {"text": ""},
        {"prompt": "go on", "completion": "the river " * 200},
        {"messages": CHAT},
    ]
    examples = read(written(tmp_path, *found), tiny_tokenizer, progress=said)
    assert (len(examples), examples.num_without_answer, examples.num_too_long) == (2, 3, 1)
    assert len(said.messages) == 1
    assert "3 without an answer and 1 of more than 64 tokens" in said.messages[0]


@pytest.mark.parametrize("found", [[], [{"text": ""}], [{"prompt": "a", "completion": "b"}]])
def test_too_few_examples_are_an_error_that_says_what_was_left_out(found, tmp_path: Path, tiny_tokenizer) -> None:
    with pytest.raises(CalibrationError, match=r"data\.jsonl leaves .* without an answer and .* --seq-len"):
        read(written(tmp_path, *found), tiny_tokenizer)


def test_a_template_that_writes_earlier_turns_anew_costs_the_conversations_that_it_does_so_to(tmp_path: Path) -> None:
    from tests.models import build_tokenizer

    fickle = build_tokenizer()
    fickle.chat_template = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    said = Said()
    found = [{"messages": CHAT}, {"messages": CHAT[:2]}, {"messages": CHAT[2:]}]
    examples = read(written(tmp_path, *found), fickle, progress=said)
    assert (len(examples), examples.num_refused) == (2, 1)
    assert "one answer each" in said.messages[0]
    with pytest.raises(CalibrationError, match="one answer each"):
        read(written(tmp_path, {"messages": CHAT}), fickle)


def test_a_header_that_the_template_puts_before_an_answer_is_not_learnt(tmp_path: Path) -> None:
    from tests.models import build_tokenizer

    thinking = build_tokenizer()
    thinking.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: the gate{% endif %}"
    )
    examples = read(written(tmp_path, {"messages": CHAT[:2]}, {"messages": CHAT}), thinking)
    assert answers(examples, thinking)[0].strip() == "it is the old river"


def test_of_a_row_with_a_chat_and_a_text_the_chat_is_learnt(tmp_path: Path, tiny_tokenizer) -> None:
    both = {"instruction": "say", "input": None, "output": "the town is old", "text": "say: the town is old"}
    examples = read(written(tmp_path, both, both), tiny_tokenizer)
    assert "say" not in answers(examples, tiny_tokenizer)[0]


def test_null_is_nothing(tmp_path: Path, tiny_tokenizer) -> None:
    found = [
        {"instruction": "x", "output": None},
        {"messages": None},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
        {"messages": CHAT},
        {"messages": CHAT[:2], "text": None},
    ]
    examples = read(written(tmp_path, *found), tiny_tokenizer)
    assert (len(examples), examples.num_without_answer) == (2, 3)


def test_a_conversation_may_begin_with_an_answer(tmp_path: Path, tiny_tokenizer) -> None:
    examples = read(written(tmp_path, {"messages": CHAT[1:]}, {"messages": CHAT}), tiny_tokenizer)
    assert "it is the old river" in answers(examples, tiny_tokenizer)[0]


def test_only_so_many_rows_are_read(tmp_path: Path, tiny_tokenizer) -> None:
    assert len(read(written(tmp_path, *[{"messages": CHAT}] * 9), tiny_tokenizer, most_rows=4)) == 4


def test_the_hash_tells_tokens_and_marks(tmp_path: Path, tiny_tokenizer) -> None:
    one = read(written(tmp_path, {"messages": CHAT}, {"messages": CHAT[:2]}), tiny_tokenizer)
    same = read(written(tmp_path, {"messages": CHAT}, {"messages": CHAT[:2]}), tiny_tokenizer)
    other = read(written(tmp_path, {"messages": CHAT[:2]}, {"messages": CHAT}), tiny_tokenizer)
    assert one.sha256 == same.sha256 != other.sha256


def test_the_bundled_instructions_are_what_their_script_makes(tiny_tokenizer) -> None:
    assert TARGET.read_text(encoding="utf-8") == rows()
    examples = read(None, tiny_tokenizer, seq_len=1024, most_rows=1000)
    assert len(examples) == 240
    assert examples.source == "bundled:instructions.jsonl"
