"""Foreign text on the terminal: shown as words, whatever it tries to be."""

from pathlib import Path

import pytest
from rich.progress import Progress
from rich.tree import Tree

from pipeline.display import Bars, new_table
from pipeline.plain_console import PlainConsole, shown
from registry import Registry

FOREIGN = "[/a][bold]gone[/bold] :smile: \x1b]0;title\x07\x9b31m\u202edlrow"
WORDS = "[/a][bold]gone[/bold] :smile: \\x1b]0;title\\x07\\x9b31m\\u202edlrow"


def test_letters_of_any_script_lines_and_tabs_stay() -> None:
    assert shown("größe 模型 ± 2\n\tmore") == "größe 模型 ± 2\n\tmore"
    assert shown("\udcff") == "\\udcff"


def test_messages_tables_titles_and_trees_show_it_as_words() -> None:
    console = PlainConsole()
    console.width = 200
    table = new_table(FOREIGN, title=FOREIGN)
    table.add_row(FOREIGN)
    tree = Tree(FOREIGN)
    tree.add(FOREIGN)
    with console.capture() as capture:
        for thing in (FOREIGN, table, tree):
            console.print(thing)
    assert capture.get().count(WORDS) == 6
    assert "\x1b" not in capture.get()


def test_bars_and_lines_of_progress_show_it_as_words(monkeypatch, capsys) -> None:
    monkeypatch.setattr("pipeline.display.SECONDS_WORTH_A_LINE", 0.0)
    assert list(Bars().track([1], FOREIGN)) == [1]
    Bars().say(FOREIGN)
    assert capsys.readouterr().err.count(WORDS) == 2
    described = []
    monkeypatch.setattr(Progress, "add_task", lambda bars, description, **rest: described.append(description) or 0)
    monkeypatch.setattr(Progress, "advance", lambda bars, task: None)
    monkeypatch.setattr("pipeline.display.ERRORS", console := PlainConsole(stderr=True))
    monkeypatch.setattr(console, "_force_terminal", True)
    assert list(Bars().track([1], FOREIGN)) == [1]
    assert described == [WORDS]


@pytest.mark.parametrize("command", ["list", "show", "lineage", "alias", "verify"])
def test_commands_show_it_as_words(command: str, tmp_path: Path, monkeypatch, bitsmith) -> None:
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path))
    folder = tmp_path / "files" / "a["
    folder.mkdir(parents=True)
    (folder / "b].txt").write_text("x")
    registry = Registry(tmp_path / "registry")
    settings = {"model": FOREIGN, "seed": FOREIGN}
    artifact = registry.add_artifact(FOREIGN, tmp_path / "files", [], {"model": FOREIGN, "settings": settings})
    registry.publish("strange", artifact, note=FOREIGN)
    registry.alias("strange", "tested", reason=FOREIGN)
    answer = bitsmith("registry", command, *(["strange"] if command != "list" else []))
    if command == "verify":
        assert "Traceback" not in answer.err
    else:
        assert answer.code == 0, answer.err
        assert "[/a][bold]gone" in answer.out.replace("\n", "")
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(answer.out + answer.err)
