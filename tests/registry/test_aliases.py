"""Aliases move, every move is logged, and a rollback goes back through the moves that still stand."""

import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from registry import InvalidNameError, NotFoundError, Registry
from registry.alias import AliasMove, actor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def three(registry: Registry, make_folder) -> Registry:
    for number in range(3):
        registry.publish("model", registry.add_artifact("checkpoint", make_folder({"a": bytes([number])})))
    return registry


def test_an_alias_names_a_version_until_it_moves(three: Registry) -> None:
    three.alias("model:1", "production", reason="first")
    assert str(three.version("model@production")) == "model:1"
    assert str(three.version("model@latest")) == str(three.version("model")) == "model:3"
    three.alias("model@latest", "production")
    three.alias("model@production", "staging")
    assert three.aliases("model") == {"production": 3, "staging": 3}
    assert three.aliases("other") == {}
    moves = [(move.alias, move.action, move.from_version, move.to_version) for move in three.alias_moves("model")]
    assert moves == [("production", "set", None, 1), ("production", "set", 1, 3), ("staging", "set", None, 3)]
    first = three.alias_moves("model")[0]
    assert (first.reason, first.moved_by) == ("first", actor())
    assert first.moved_at.endswith("+00:00")
    assert len(three.alias_moves("model", "staging")) == 1


def test_the_log_says_who(three: Registry, monkeypatch) -> None:
    monkeypatch.setenv("BITSMITH_ACTOR", "nightly")
    assert three.alias("model", "production").moved_by == "nightly"


def test_a_rollback_goes_back_step_by_step(three: Registry) -> None:
    for number in (1, 2, 2, 3):
        three.alias(f"model:{number}", "production")
    assert three.rollback("model", "production", reason="slow").to_version == 2
    assert three.rollback("model", "production").to_version == 1
    with pytest.raises(NotFoundError, match="nothing to go back to"):
        three.rollback("model", "production")
    three.alias("model:3", "production")
    assert three.rollback("model", "production").to_version == 1


def test_nothing_goes_back_over_a_removal(three: Registry) -> None:
    three.alias("model:1", "production")
    assert three.remove_alias("model", "production").to_version is None
    with pytest.raises(NotFoundError, match="no alias 'model@production'"):
        three.version("model@production")
    three.alias("model:2", "production")
    with pytest.raises(NotFoundError, match="nothing to go back to"):
        three.rollback("model", "production")


@pytest.mark.parametrize("seed", range(50))
def test_a_rollback_is_the_inverse_of_a_move(seed: int) -> None:
    """Against a list that every move is pushed to and every rollback pops from."""
    draw, moves, stack = random.Random(seed), [], []
    for number in range(30):
        current = stack[-1] if stack else None
        back = AliasMove.before(moves)
        assert back == (stack[-2] if len(stack) > 1 else None)
        if back is not None and draw.random() < 0.4:
            stack.pop()
            moves.append(AliasMove("m", number, "a", AliasMove.ROLLBACK, current, back, "", "", ""))
        elif draw.random() < 0.1:
            stack.clear()
            moves.append(AliasMove("m", number, "a", AliasMove.REMOVE, current, None, "", "", ""))
        else:
            target = draw.randint(1, 4)
            if target != current:
                stack.append(target)
            moves.append(AliasMove("m", number, "a", AliasMove.SET, current, target, "", "", ""))


def test_what_is_not_there_is_named(three: Registry) -> None:
    three.alias("model", "production")
    with pytest.raises(NotFoundError, match="Did you mean model@production"):
        three.version("model@prodution")
    with pytest.raises(NotFoundError, match="There is no model 'modle'"):
        three.version("modle@production")
    with pytest.raises(NotFoundError):
        three.alias("model:9", "production")
    with pytest.raises(NotFoundError):
        three.remove_alias("model", "staging")
    with pytest.raises(NotFoundError):
        three.rollback("model", "staging")
    assert three.aliases("model") == {"production": 3}
    assert len(three.alias_moves("model")) == 1


@pytest.mark.parametrize("alias", ["latest", "", "-a", "a b", "a/b", "a" * 97, "a@b"])
def test_malformed_aliases_are_refused(alias: str, three: Registry) -> None:
    with pytest.raises(InvalidNameError):
        three.alias("model", alias)
    if alias != "latest":
        with pytest.raises(InvalidNameError):
            three.version(f"model@{alias}")


MOVE = """
import sys
from itertools import pairwise
from pathlib import Path
from registry import Registry
registry = Registry(Path(sys.argv[1]))
for turn in range(20):
    registry.alias(f"model:{turn % 3 + 1}", "production")
"""


def test_moves_at_once_are_all_logged_in_one_line(three: Registry) -> None:
    command = [sys.executable, "-c", MOVE, str(three.root)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    moves = three.alias_moves("model")
    assert len(moves) == 80
    assert moves[0].from_version is None
    assert all(later.from_version == earlier.to_version for earlier, later in pairwise(moves))
    assert three.aliases("model") == {"production": moves[-1].to_version}
