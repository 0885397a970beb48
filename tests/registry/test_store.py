"""Laws of the store: a name is the hash of what is behind it, always, also after a kill."""

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from registry import (
    Artifact,
    FileEntry,
    IntegrityError,
    NotFoundError,
    RegistryError,
    Store,
    TargetExistsError,
)
from registry.artifact import sha256_of
from registry.remote import RemoteBlobs


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """The blobs below tmp_path/"store", alone or as the cache of a remote store."""
    if request.param == "local":
        return Store(tmp_path / "store")
    remote = RemoteBlobs(f"file://{tmp_path}/remote")
    remote.claim("the index of the tests")
    return Store(tmp_path / "store", remote)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.bin"
    path.write_bytes(os.urandom(3 << 20))
    return path


def blobs_of(store_root: Path) -> list[Path]:
    return [path for path in (store_root / "blobs" / "sha256").rglob("*") if path.is_file()]


def flip_a_byte(path: Path) -> None:
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("move", [False, True])
def test_added_bytes_come_back(store: Store, source: Path, move: bool):
    content = source.read_bytes()
    entry = store.add(source, move=move)
    assert entry == FileEntry(hashlib.sha256(content).hexdigest(), len(content))
    assert store.open(entry.sha256).read() == content
    assert store.path(entry.sha256).stat().st_mode & 0o777 == 0o444
    assert source.exists() != move
    store.verify(entry, "source")


def test_equal_content_is_kept_once(store: Store, tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"same")
    assert store.add(tmp_path / "one") == store.add(tmp_path / "two", move=True)
    assert len(blobs_of(tmp_path / "store")) == 1
    assert not list((tmp_path / "store" / "blobs" / "incoming").iterdir())


def test_a_copy_does_not_follow_later_edits_of_its_source(store: Store, source: Path):
    before = source.read_bytes()
    entry = store.add(source)
    flip_a_byte(source)
    assert source.read_bytes() != before
    assert store.path(entry.sha256).read_bytes() == before


def test_a_moved_file_with_a_second_name_is_copied(store: Store, source: Path, tmp_path: Path):
    os.link(source, tmp_path / "second")
    entry = store.add(source, move=True)
    flip_a_byte(tmp_path / "second")
    store.verify(entry, "source")
    assert not source.exists()


def test_a_flipped_byte_is_noticed_and_adding_again_heals_it(store: Store, source: Path):
    entry = store.add(source)
    flip_a_byte(store.path(entry.sha256))
    with pytest.raises(IntegrityError, match=r"weights\.bin is damaged") as caught:
        store.verify(entry, "weights.bin")
    assert entry.sha256 in caught.value.expected
    assert caught.value.what == "weights.bin"
    store.add(source)
    store.verify(entry, "weights.bin")


def test_a_cut_blob_is_noticed(store: Store, source: Path):
    entry = store.add(source)
    path = store.path(entry.sha256)
    path.chmod(0o644)
    os.truncate(path, 10)
    assert not store.has(entry)
    with pytest.raises(IntegrityError, match="10 bytes"):
        store.verify(entry, "weights.bin")


def test_a_missing_blob_is_not_found(store: Store, source: Path, tmp_path: Path):
    entry = store.add(source)
    store.path(entry.sha256).unlink()
    shutil.rmtree(tmp_path / "remote" / "sha256", ignore_errors=True)
    assert not store.has(entry)
    for ask in (store.path, store.open):
        with pytest.raises(NotFoundError, match=entry.sha256[:12]):
            ask(entry.sha256)


ADD_SLOWLY = """
import os, sys, time
from pathlib import Path
from registry.store import Store
real = os.fsync
def slow(descriptor):
    print("writing", flush=True)
    time.sleep(60)
    real(descriptor)
os.fsync = slow
Store(Path(sys.argv[1])).add(Path(sys.argv[2]))
"""


def test_a_kill_in_the_middle_of_add_leaves_no_blob(store: Store, source: Path, tmp_path: Path):
    command = [sys.executable, "-c", ADD_SLOWLY, str(tmp_path / "store"), str(source)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert blobs_of(tmp_path / "store") == []
    assert len(list((tmp_path / "store" / "blobs" / "incoming").iterdir())) == 1
    store.verify(store.add(source), "source")


def test_kills_at_random_moments_never_leave_a_wrong_blob(source: Path, tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from registry.store import Store\n"
        "store = Store(Path(sys.argv[1]))\nprint('go', flush=True)\n"
        "while True: store.add(Path(sys.argv[2]))"
    )
    for delay_seconds in (0.003, 0.01, 0.02):
        command = [sys.executable, "-c", code, str(tmp_path / "store"), str(source)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay_seconds)
            process.kill()
        for blob in blobs_of(tmp_path / "store"):
            assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name


def test_materialize_writes_files_of_their_own(store: Store, tmp_path: Path):
    files = {"a.txt": b"one", "deep/er/b.bin": b"\x00" * 5000}
    entries = {}
    for path, content in files.items():
        (tmp_path / "file").write_bytes(content)
        entries[path] = store.add(tmp_path / "file")
    artifact = Artifact.create("plan", entries)
    out = tmp_path / "out"
    store.materialize(artifact, out)
    assert {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()} == files
    (out / "deep" / "er" / "b.bin").unlink()
    store.materialize(artifact, out)
    assert (out / "deep" / "er" / "b.bin").read_bytes() == b"\x00" * 5000, "the same again completes"
    (out / "a.txt").write_bytes(b"edited")
    store.verify(entries["a.txt"], "a.txt")
    with pytest.raises(TargetExistsError, match=r"a\.txt exists"):
        store.materialize(artifact, out)
    assert (out / "a.txt").read_bytes() == b"edited"


def test_a_link_to_the_same_bytes_is_in_the_way(store: Store, source: Path, tmp_path: Path):
    artifact = Artifact.create("plan", {"weights.bin": store.add(source)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights.bin").symlink_to(source)
    with pytest.raises(TargetExistsError):
        store.materialize(artifact, tmp_path / "out")


def test_a_killed_materialize_is_repeated_and_leaves_nothing(store: Store, tmp_path: Path):
    entries = {}
    for number in range(12):
        (tmp_path / "file").write_bytes(bytes([number]) * 2_000_000)
        entries[f"{number % 3}/{number}"] = store.add(tmp_path / "file")
    artifact, out = Artifact.create("plan", entries), tmp_path / "out"
    code = (
        "import sys; from pathlib import Path\n"
        "from registry.artifact import Artifact; from registry.store import Store\n"
        "artifact = Artifact.from_json(sys.stdin.read()); print('go', flush=True)\n"
        "Store(Path(sys.argv[1])).materialize(artifact, Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store"), str(out)]
    left = set()
    for _ in range(12):
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=Path(__file__).parents[2]) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(artifact.to_json().encode())
            process.stdin.close()
            process.stdout.readline()
            while process.poll() is None and not set(out.glob("*/.*.partial")) - left:
                time.sleep(0.001)
            process.kill()
        left |= set(out.glob("*/.*.partial"))
    assert left, "one was killed while it wrote"
    living = out / ".0123456789abcdef.partial"
    with living.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        store.materialize(artifact, out)
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {*entries, living.name}


def test_materialize_refuses_a_damaged_blob_and_leaves_nothing(store: Store, source: Path, tmp_path: Path):
    artifact = Artifact.create("plan", {"weights.bin": store.add(source)})
    flip_a_byte(store.path(artifact.files["weights.bin"].sha256))
    with pytest.raises(IntegrityError, match=r"weights\.bin"):
        store.materialize(artifact, tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_materialize_does_not_follow_a_link_out_of_the_folder(store: Store, source: Path, tmp_path: Path):
    artifact = Artifact.create("plan", {"sub/weights.bin": store.add(source)})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RegistryError, match="leads out of"):
        store.materialize(artifact, tmp_path / "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_hand_made_artifact_with_a_path_outside_is_refused(store: Store, source: Path, tmp_path: Path):
    entry = store.add(source)
    evil = Artifact(sha256_of({}), "plan", {"../../escaped": entry}, (), {})
    with pytest.raises(RegistryError, match="refused"):
        store.materialize(evil, tmp_path / "a" / "b")
    assert not (tmp_path / "escaped").exists()


def test_a_full_disk_is_a_registry_error_with_the_path(store: Store, source: Path, tmp_path: Path, monkeypatch):
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RegistryError, match=r"source\.bin.*disk is full"):
        store.add(source)
    assert blobs_of(tmp_path / "store") == []
    assert not list((tmp_path / "store" / "blobs" / "incoming").iterdir())


def test_a_file_in_the_way_of_the_root_is_a_registry_error(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RegistryError, match="cannot be read or written"):
        Store(tmp_path / "file" / "store")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_a_registry_error(tmp_path: Path):
    tmp_path.chmod(0o555)
    with pytest.raises(RegistryError, match="permissions"):
        Store(tmp_path / "store")
