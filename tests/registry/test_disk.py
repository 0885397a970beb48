"""A full disk stops a command and nothing else; a folder that may not be written can be read."""

import os
from pathlib import Path

import pytest

from benchmarks.registry_damage import facts, make_named
from benchmarks.registry_disk import (
    COMMANDS,
    CannotMountError,
    Command,
    drill_full,
    drill_read_only,
    read_only,
    refusal,
    small_disk,
)
from registry import Registry, RegistryError

NOBODY = 65534


@pytest.fixture(scope="module")
def may_mount() -> None:
    try:
        with small_disk():
            pass
    except CannotMountError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("may_mount")
@pytest.mark.parametrize("prepare", COMMANDS, ids=lambda prepare: prepare.__name__)
def test_a_full_disk_refuses_and_the_same_command_completes_later(prepare, tmp_path: Path) -> None:
    with small_disk() as disk:
        num_refused, _ = drill_full(disk, tmp_path, prepare, (0, 57_344, 131_072))
    assert num_refused > 0


@pytest.mark.usefixtures("may_mount")
def test_a_read_only_mount_is_read_and_not_written(tmp_path: Path) -> None:
    drill_read_only(tmp_path / "registry", tmp_path)


def as_nobody(work: Command) -> str:
    """What it says, run by a user who owns nothing; "" if it completes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(writer, (refusal(work) or "").encode())
        except BaseException as error:
            os.write(writer, f"a traceback: {error!r}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.usefixtures("may_mount")
def test_another_user_reads_and_may_not_write() -> None:
    with small_disk() as disk:
        root = disk / "registry"
        make_named(Registry(root))
        before = facts(Registry(root))
        (disk / "folder").mkdir()
        (disk / "folder" / "file").write_bytes(b"1")

        def read() -> None:
            if facts(Registry(root)) != before or Registry.examine(root):
                raise RegistryError("it reads something else")

        assert as_nobody(read) == ""
        refused = {
            "add": lambda: Registry(root).add_artifact("checkpoint", disk / "folder"),
            "alias": lambda: Registry(root).alias("model:1", "production"),
            "publish": lambda: Registry(root).publish("other", Registry(root).get(before[0][0].digest)),
            "repair": lambda: Registry.examine(root, repair=True),
        }
        for what, command in refused.items():
            said = as_nobody(command)
            assert "Access is refused" in said or "read-only" in said, f"{what}: {said}"
        assert facts(Registry(root)) == before


@pytest.mark.usefixtures("may_mount")
def test_an_index_that_is_behind_is_brought_up_in_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of a read-only mount sees what the records tell, and the doctor says that nothing was mended."""
    registry = Registry(tmp_path / "registry")
    make_named(registry)
    add = registry._ledger._records.add

    def killed(fact) -> None:
        add(fact)
        raise KeyboardInterrupt

    monkeypatch.setattr(registry._ledger._records, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        registry.publish("other", registry.get(registry.version("model").digest))
    with read_only(registry.root):
        (found,) = Registry.examine(registry.root)
        assert (found.problem, found.is_repaired) == ("lacked version 1 of other", False)
        assert str(Registry(registry.root).version("other")) == "other:1"
    (found,) = Registry.examine(registry.root)
    assert (found.problem, found.is_repaired) == ("lacked version 1 of other", True)
