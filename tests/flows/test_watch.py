"""watch, night after night, in this process and with no Hub; with one, and a worker, in test_nightly.py."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from registry import Registry

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    return shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("models") / "base")


def test_night_after_night(
    server: str, base: Path, tiny_model_dir: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """One test, as each night goes on from the one before."""
    from flows.watch import watch
    from tests.models import build_llama, save_model

    registry = Registry(tmp_path / "registry")
    watched = recipe | {"model": str(base), "sensitivity": "none"}
    settings: dict[str, Any] = {"name": "tiny", "alias": "production", "registry": str(registry.root)}

    def night(*gates: str) -> Any:
        return watch(watched, str(tmp_path / "out"), gates=list(gates), return_state=True, **settings)

    first = night("kld<=1e9", "bits_per_param<=4.5")
    assert first.name == "Completed", first.message
    assert first.result() == ["tiny:1"]
    assert str(registry.version("tiny@production")) == "tiny:1"

    second = night("kld<=1e9", "bits_per_param<=4.5")
    assert (second.type.value, second.name) == ("COMPLETED", "Skipped")
    assert "its recipe is the same" in second.message

    save_model(build_llama(seed=1), base)
    third = night("kld<=0")
    assert (third.type.value, third.name) == ("FAILED", "Gated")
    assert "wanted <=0 (not met)" in third.message
    assert str(registry.version("tiny")) == "tiny:2"
    assert str(registry.version("tiny@production")) == "tiny:1"

    fourth = night("kld<=1e9")  # the base is as in the third, and the gate lets the version pass
    assert fourth.name == "Completed", fourth.message
    assert str(registry.version("tiny@production")) == "tiny:2"
    assert len(registry.versions()) == 2

    registry.rollback("tiny", "production", reason="answers in rhymes")
    for again in (night("kld<=1e9"), night("kld<=1e9")):
        assert again.name == "Skipped", again.message
        assert "tiny@production, which named tiny:2, names version 1 by rollback of " in again.message
    registry.remove_alias("tiny", "production")
    assert "names nothing by remove of " in night("kld<=1e9").message
    assert registry.aliases("tiny") == {}

    del settings["alias"]  # gates are all that is asked of a version now
    for gate, name in (("kld<=0", "Gated"), ("kld<=0", "Gated"), ("kld<=1e9", "Skipped")):
        assert night(gate).name == name

    watched["budget"] = "4bpw"  # another checkpoint, in a folder of its own
    assert night().result() == ["tiny:3"]

    settings["alias"] = "staging"
    assert night("kld<=1e9").result() == ["tiny:3"]
    watched["budget"] = recipe["budget"]  # what was made then is what is wanted now
    back = night("kld<=1e9")
    assert (back.name, back.result()) == ("Completed", ["tiny:2"])
    assert registry.aliases("tiny") == {"staging": 2}
    assert night("kld<=1e9").name == "Skipped"
    shutil.copytree(tiny_model_dir, base, dirs_exist_ok=True)  # and so with the base
    assert night("kld<=1e9").result() == ["tiny:1"]
    assert registry.aliases("tiny") == {"staging": 1}
    assert len(registry.versions()) == 3


def test_a_version_that_lost_its_alias_by_hand_is_not_promoted_on_the_way_to_the_hub(tmp_path: Path) -> None:
    """A run that has something else to do, too."""
    from flows import release

    registry = Registry(tmp_path / "registry")
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "weights").write_bytes(bytes([number]))
        registry.publish("tiny", registry.add_artifact("checkpoint", tmp_path / str(number)))
        release.promote.fn(f"tiny:{number + 1}", "production", [], str(registry.root))
    assert registry.aliases("tiny") == {"production": 2}
    registry.alias("tiny:1", "production")
    left = release._unsettled(registry, ["tiny:2"], [], "alice/small", "production")
    assert left == ["tiny:2 is not at alice/small yet"]
    release.promote.fn("tiny:2", "production", [], str(registry.root))
    assert registry.aliases("tiny") == {"production": 1}
    registry.alias("tiny:2", "production")
    registry.rollback("tiny", "production")
    registry.alias("tiny:2", "production")  # as it was
    assert release._left_by_hand(registry, ["tiny:2"], "production") == []
