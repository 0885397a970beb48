"""What is published names a model and texts of the author's disk, and not the folders that they lie in."""

import json
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from pipeline.card import write_card
from pipeline.compress import Compressed, compress
from pipeline.errors import RecipeChangedError
from pipeline.pareto import write_pareto
from pipeline.recipe import Recipe
from registry import Registry
from registry.publication import Publication
from tests.pipeline.small import SMALL

SECRET = "folder-of-anna"

pytestmark = pytest.mark.usefixtures("quick")


def anna(place: Path, model: Path) -> Path:
    """A folder with a model that says where it came from, and three texts."""
    folder = place / SECRET
    (folder / "texts").mkdir(parents=True)
    shutil.copytree(model, folder / "my-llama")
    config = json.loads((folder / "my-llama" / "config.json").read_text())
    config["_name_or_path"] = f"/home/{SECRET}/before"
    (folder / "my-llama" / "config.json").write_text(json.dumps(config))
    for name, text in (("mine.txt", "calibration.txt"), ("test.txt", "evaluation.txt")):
        content = (resources.files("pipeline") / "data" / text).read_text(encoding="utf-8")[:20_000]
        (folder / "texts" / name).write_text(content)
    return folder


def local_recipe(folder: Path) -> Recipe:
    texts = {"dataset": str(folder / "texts" / "mine.txt"), "eval_dataset": str(folder / "texts" / "test.txt")}
    return Recipe.of(model=str(folder / "my-llama"), **(SMALL | texts))


@pytest.fixture(scope="module")
def made(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Compressed]:
    place = tmp_path_factory.mktemp("local")
    recipe = local_recipe(anna(place, tiny_model_dir))
    return place, compress(recipe, Registry(place / "registry"), place / "out", name="tiny")


def published(place: Path) -> Iterator[tuple[str, bytes]]:
    """All that the finished folder and a repository on the Hub hold."""
    registry = Registry(place / "registry")
    version = registry.version("tiny")
    for path in (place / "out").rglob("*"):
        if path.is_file():
            yield path.name, path.read_bytes()
    card = write_card(registry, version, "alice/tiny", "v1")
    for name, content in Publication.of(registry, version, card).contents.items():
        yield name, content.read()


def test_no_byte_that_is_published_names_a_folder(made: tuple[Path, Compressed]) -> None:
    place, _ = made
    files = list(published(place))
    assert {"recipe.json", "index.html", "README.md", "bitsmith-manifest.json"} <= {name for name, _ in files}
    leaks = [name for name, content in files if SECRET.encode() in content or str(place).encode() in content]
    assert leaks == []


def test_the_names_and_the_hashes_are_there(made: tuple[Path, Compressed]) -> None:
    place, _ = made
    recipe = json.loads((place / "out" / "recipe.json").read_text())
    assert (recipe["model"], recipe["dataset"], recipe["eval_dataset"]) == ("my-llama", "mine.txt", "test.txt")
    for key in ("model_sha256", "calibration_sha256", "evaluation_sha256"):
        assert len(recipe[key]) == 64
    page = (place / "out" / "report" / "index.html").read_text()
    assert "bitsmith compress my-llama " in page
    assert "mine.txt" in page


def test_the_page_of_several_budgets_names_no_folder(made: tuple[Path, Compressed], tmp_path: Path) -> None:
    place, _ = made
    shutil.copytree(place / "out", tmp_path / "4.5bpw")
    write_pareto(tmp_path)
    for name in ("pareto.json", "index.html"):
        content = (tmp_path / name).read_text()
        assert "my-llama" in content
        assert SECRET not in content


def test_the_same_files_in_another_folder_are_the_same_work(made: tuple[Path, Compressed], tmp_path: Path) -> None:
    place, first = made
    shutil.copytree(place / SECRET, tmp_path / "moved")
    for folder in (place / SECRET, tmp_path / "moved"):
        again = compress(local_recipe(folder), Registry(place / "registry"), place / "out", name="tiny")
        assert again.was_finished
        assert again.version == first.version
        assert all(stage.reused for stage in again.stages if stage.name != "open")


@pytest.mark.parametrize(("text", "field"), [("mine.txt", "calibration_sha256"), ("test.txt", "evaluation_sha256")])
def test_another_text_of_the_same_name_is_another_recipe(
    text: str, field: str, made: tuple[Path, Compressed], tmp_path: Path
) -> None:
    place, _ = made
    shutil.copytree(place / SECRET, tmp_path / "moved")
    changed = tmp_path / "moved" / "texts" / text
    changed.write_text("Something else. " + changed.read_text())
    with pytest.raises(RecipeChangedError, match=f"{field} was"):
        compress(local_recipe(tmp_path / "moved"), Registry(place / "registry"), place / "out", name="tiny")
