"""Write pipeline/data/instructions.jsonl: small tasks with one right answer each, made by rule from a seed.

    python -m benchmarks.make_instructions

The tasks need no knowledge, only a form of answer, which is what a few steps of finetuning can teach.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

TARGET = Path(__file__).parents[1] / "pipeline" / "data" / "instructions.jsonl"
NUM_ROWS = 240
FRUITS = ("apple", "banana", "cherry", "date", "fig", "grape", "lemon", "mango", "orange", "peach", "plum", "quince")
NAMES = ("Ada", "Alan", "Barbara", "Claude", "Donald", "Edsger", "Emmy", "Grace", "John", "Kurt", "Leslie", "Tim")
CITIES = ("Athens", "Berlin", "Cairo", "Dublin", "Geneva", "Lima", "Lisbon", "Oslo", "Paris", "Prague", "Rome")
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
UNITS = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("hours", "minutes", 60),
    ("kilograms", "grams", 1000),
    ("weeks", "days", 7),
)


def sorted_words(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(FRUITS, 4)
    return f"Put these words in alphabetical order: {', '.join(words)}.", ", ".join(sorted(words))


def as_json(draw: random.Random) -> tuple[str, str]:
    name, city, age = draw.choice(NAMES), draw.choice(CITIES), draw.randint(18, 90)
    text = f"{name} is {age} years old and lives in {city}."
    answer = json.dumps({"name": name, "age": age, "city": city})
    return f"Give the facts in this sentence as JSON with the keys name, age and city: {text}", answer


def converted(draw: random.Random) -> tuple[str, str]:
    large, small, factor = draw.choice(UNITS)
    number = draw.randint(2, 12)
    return f"How many {small} are {number} {large}?", f"{number} {large} are {number * factor} {small}."


def later_day(draw: random.Random) -> tuple[str, str]:
    place, ahead = draw.randrange(7), draw.randint(1, 6)
    question = f"Today is {DAYS[place]}. Which day is it in {ahead} day{'s' if ahead > 1 else ''}?"
    return question, f"It is {DAYS[(place + ahead) % 7]}."


def as_list(draw: random.Random) -> tuple[str, str]:
    names = draw.sample(NAMES, 3)
    sentence = f"{names[0]}, {names[1]} and {names[2]} came to {draw.choice(CITIES)}."
    return f"List the people in this sentence, one a line: {sentence}", "\n".join(f"- {name}" for name in names)


def counted(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(FRUITS, draw.randint(2, 7))
    return f"How many words are in this list: {' '.join(words)}?", f"There are {len(words)} words."


TASKS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    sorted_words,
    as_json,
    converted,
    later_day,
    as_list,
    counted,
)


def rows() -> str:
    """The file's content: no two rows ask the same, and the kinds of tasks take turns."""
    draw = random.Random(0)
    found: dict[str, str] = {}
    while len(found) < NUM_ROWS:
        question, answer = TASKS[len(found) % len(TASKS)](draw)
        found.setdefault(question, answer)
    lines = (json.dumps({"instruction": question, "output": answer}) for question, answer in found.items())
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    TARGET.write_text(rows(), encoding="utf-8")
