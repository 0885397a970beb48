"""A disk that fills up in the middle of a compression: work is kept, and the message says how much is needed."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.registry_disk import CannotMountError, small_disk
from pipeline import compress as compression
from pipeline.compress import compress
from pipeline.errors import DiskSpaceError
from pipeline.recipe import Recipe
from registry import Registry
from tests.architectures import build_causal
from tests.models import save_model
from tests.pipeline.small import SMALL

pytestmark = pytest.mark.usefixtures("quick")
DISK_BYTES = 16 << 20
MOST_BYTES = 1_000_000  # about what the run takes


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """On which a run begins whatever its free space, as if others filled it meanwhile."""
    monkeypatch.setattr(compression, "check_disk", lambda runs, out: None)
    try:
        with small_disk(DISK_BYTES) as folder:
            monkeypatch.setenv("BITSMITH_HOME", str(folder / "home"))
            (folder / "home").mkdir()
            yield folder
    except CannotMountError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("room_bytes", [150_000, pytest.param(450_000, marks=pytest.mark.slow)])
def test_work_is_kept_and_the_same_command_goes_on(room_bytes: int, disk: Path, tmp_path: Path) -> None:
    model = save_model(build_causal("llama"), tmp_path / "model")
    recipe = Recipe.of(model=str(model), **(SMALL | {"sensitivity": "fisher"}))
    whole = compress(recipe, Registry(tmp_path / "registry"), tmp_path / "out")
    registry = Registry(disk / "home" / "registry")
    (disk / "filler").write_bytes(b"\0" * (shutil.disk_usage(disk).free - room_bytes))
    with pytest.raises(DiskSpaceError) as caught:
        compress(recipe, registry, disk / "out")
    message = str(caught.value)
    assert "full" in message
    assert "free some space" in message
    assert re.search(r"the whole run writes up to [\d.]+ [kM]B", message)
    assert not (disk / "out").exists() or room_bytes > MOST_BYTES / 2
    (disk / "filler").unlink()
    done = compress(recipe, registry, disk / "out")
    assert done.version.digest == whole.version.digest
    assert [finding for finding in Registry.examine(registry.root) if "unfinished" not in str(finding)] == []


def test_other_errors_of_the_system_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pipeline.run.measure_costs", fail)
    recipe = Recipe.of(model=str(save_model(build_causal("llama"), tmp_path / "model")), **SMALL)
    with pytest.raises(OSError, match="Input/output") as caught:
        compress(recipe, Registry(tmp_path / "registry"), tmp_path / "out")
    assert not isinstance(caught.value, DiskSpaceError)
