"""Hostile names, archives and descriptions: nothing is written outside, nothing runs, nothing is half taken in."""

import hashlib
import io
import json
import os
import pickle
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry import Registry, RegistryError, UnsafePathError, export_version, import_version
from registry.artifact import canonical_json

HEAD = "bitsmith-export.json"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def everything_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


# What is added


@pytest.mark.parametrize(
    "names",
    [
        [b"back\\slash"],
        [b"..\\..\\evil"],
        [b"new\nline"],
        [b"\x1b[2Jescape"],
        [b"not-utf-8-\xff"],
        [b"C:evil"],
        [b"A", b"a"],
        ["caf\u00e9".encode(), "cafe\u0301".encode()],
        [b"Sub/x", b"sub"],
        [b"/".join([b"d" * 250] * 5)],
        [b"/".join([b"d" * 250] * 16)],
    ],
    ids=repr,
)
@pytest.mark.parametrize("move", [False, True])
def test_hostile_names_are_refused_before_anything_is_taken_in(
    names: list[bytes], move: bool, registry: Registry, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "honest").write_bytes(b"1")
    for name in names:
        make_deep(folder, name)
    with pytest.raises(UnsafePathError):
        registry.add_artifact("checkpoint", folder, move=move)
    assert list(registry.store.blobs()) == []
    assert (folder / "honest").exists(), "a refused folder is left as it was"


def make_deep(folder: Path, name: bytes) -> None:
    """Write a file whose path may be longer than one call of the system takes."""
    *parents, last = name.split(b"/")
    descriptor = os.open(folder, os.O_RDONLY)
    for parent in parents:
        os.mkdir(parent, dir_fd=descriptor)
        below = os.open(parent, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(os.open(last, os.O_WRONLY | os.O_CREAT, dir_fd=descriptor))
    os.close(descriptor)


def link_to_a_file(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def link_to_a_folder(path: Path) -> None:
    path.symlink_to("/etc")


def dangling_link(path: Path) -> None:
    path.symlink_to("../../nowhere")


def link_in_a_circle(path: Path) -> None:
    path.symlink_to(path.parent)


def open_socket(path: Path) -> None:
    os.chdir(path.parent)  # names of sockets are short
    socket.socket(socket.AF_UNIX).bind(path.name)


@pytest.mark.parametrize(
    "make", [link_to_a_file, link_to_a_folder, dangling_link, link_in_a_circle, os.mkfifo, open_socket]
)
@pytest.mark.parametrize("move", [False, True])
def test_links_and_special_files_are_not_followed(
    make: Callable[[Path], None], move: bool, registry: Registry, make_folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder({"honest": b"1", "sub/honest": b"2"})
    monkeypatch.chdir(folder)  # and back again
    make(folder / "sub" / "trap")
    with pytest.raises(RegistryError, match="link or a special file"):
        registry.add_artifact("checkpoint", folder, move=move)
    assert list(registry.store.blobs()) == []


class Bomb:
    """Runs when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_pickle_is_bytes_like_any_other(registry: Registry, make_folder, tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    bomb = pickle.dumps(Bomb(trace))
    files = {
        "pytorch_model.bin": bomb,
        "config.json": b'{"auto_map": {"AutoModel": "evil--code.Model"}}',
        "code.py": b"1/0",
    }
    artifact = registry.add_artifact("checkpoint", make_folder(files))
    registry.publish("model", artifact)
    assert registry.verify("model").ok
    other = Registry(tmp_path / "other")
    import_version(other, export_version(registry, "model", tmp_path / "model.tar").path)
    other.materialize(other.get(artifact.digest), tmp_path / "out")
    assert Registry.examine(other.root) == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    assert not trace.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_not_left_out(registry: Registry, make_folder) -> None:
    folder = make_folder({"honest": b"1", "sub/secret": b"2"})
    (folder / "sub").chmod(0)
    with pytest.raises(RegistryError, match="sub cannot be read"):
        registry.add_artifact("checkpoint", folder)


# What is imported


def described(files: dict[str, tuple[str, Any]], **changes: Any) -> tuple[str, bytes]:
    """Digest and description of an artifact whose own name is right, whatever it says."""
    entries = {path: {"sha256": sha256, "size_bytes": size} for path, (sha256, size) in files.items()}
    content = {"format": 1, "kind": "checkpoint", "files": entries, "parents": [], "metadata": {}} | changes
    digest = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    return digest, json.dumps(content | {"digest": digest}).encode()


def archive(
    path: Path, digest: str, description: bytes, blobs: dict[str, bytes], version: dict[str, Any] | None = None
) -> Path:
    """An export of one version as an attacker writes it; `version` are changes of its head."""
    facts = {"name": "model", "number": 1, "digest": digest, "report_digest": None, "created_at": "", "note": ""}
    head = {"format": 1, "version": facts | (version or {}), "signatures": []}
    members = {HEAD: canonical_json(head).encode(), f"artifacts/{digest}.json": description}
    members |= {f"blobs/{sha256}": content for sha256, content in blobs.items()}
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


CONTENT = b"content"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HONEST = (SHA256, len(CONTENT))


def test_the_forger_of_these_tests_can_write_an_honest_export(registry: Registry, tmp_path: Path) -> None:
    digest, description = described({"file": HONEST})
    import_version(registry, archive(tmp_path / "x.tar", digest, description, {SHA256: CONTENT}))
    assert registry.verify("model").ok


@pytest.mark.parametrize(
    "files",
    [
        {"../../evil": HONEST},
        {"/tmp/evil": HONEST},
        {"a/../../evil": HONEST},
        {"..\\evil": HONEST},
        {"nul\x00byte": HONEST},
        {"x" * 4096: HONEST},
        {"d/" * 2048 + "x": HONEST},
        {"A": HONEST, "a": HONEST},
        {"a": HONEST, "a/b": HONEST},
        {"file": (SHA256, len(CONTENT) + 1)},
        {"file": (SHA256, len(CONTENT) - 1)},
        {"file": (SHA256, 0)},
        {"file": (SHA256, -1)},
        {"file": (SHA256, 2**80)},
        {"file": (SHA256, 7.0)},
        {"file": (SHA256, True)},
        {"file": ("../" * 20 + "etc/passwd", len(CONTENT))},
        {"one": HONEST, "two": (SHA256, len(CONTENT) + 1)},
        {"one": (SHA256, len(CONTENT) + 1), "two": HONEST},
    ],
    ids=lambda files: repr(files)[:60],
)
def test_a_description_that_lies_is_refused(files: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    digest, description = described(files)
    path = archive(tmp_path / "x.tar", digest, description, {SHA256: CONTENT})
    before = {name for name in everything_below(tmp_path) if not name.startswith(str(registry.root))}
    with pytest.raises(RegistryError):
        import_version(registry, path)
    assert registry.versions() == []
    after = {name for name in everything_below(tmp_path) if not name.startswith(str(registry.root))}
    assert after == before
    assert Registry.examine(registry.root) == []


@pytest.mark.parametrize(
    "version",
    [
        {"name": "../../etc"},
        {"name": "a" * 200},
        {"name": None},
        {"note": {"a": 1}},
        {"note": None},
        {"digest": "../evil"},
        {"report_digest": "../evil"},
        {"report_digest": ""},
        {"more": 1},
    ],
    ids=repr,
)
def test_a_head_that_lies_is_refused(version: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    digest, description = described({"file": HONEST})
    with pytest.raises(RegistryError):
        import_version(registry, archive(tmp_path / "x.tar", digest, description, {SHA256: CONTENT}, version))
    assert registry.versions() == []


@pytest.mark.parametrize(
    "text", [b"[" * 500_000, b'{"a":' * 200_000, b"9" * 10_000, b"\xff\xfe", b"1e999", b"NaN"], ids=len
)
def test_json_that_is_a_trap_is_refused(text: bytes, registry: Registry, tmp_path: Path) -> None:
    digest, _ = described({"file": HONEST})
    with pytest.raises(RegistryError):
        import_version(registry, archive(tmp_path / "x.tar", digest, text, {SHA256: CONTENT}))
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        member = tarfile.TarInfo(HEAD)
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))
    with pytest.raises(RegistryError):
        import_version(registry, tmp_path / "y.tar")


def test_a_small_archive_does_not_unfold_into_a_full_disk(registry: Registry, tmp_path: Path) -> None:
    """A sparse member says that it is a terabyte of zeros."""
    size = 1 << 40
    digest, description = described({"file": ("0" * 64, size)})
    path = archive(tmp_path / "x.tar", digest, description, {})
    member = tarfile.TarInfo("blobs/" + "0" * 64)
    member.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": f"{size},0",
        "GNU.sparse.size": str(size),
    }
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member)
    with pytest.raises(RegistryError, match="no plain file"):
        import_version(registry, path)
    assert list(registry.store.unfinished()) == []


@pytest.mark.parametrize("field", [slice(100, 108), slice(124, 136), slice(148, 156), slice(156, 157), slice(345, 500)])
@pytest.mark.parametrize("value", [b"\xff", b"\x80", b"\x00", b"9", b"-", b" "], ids=repr)
def test_malformed_headers_are_refused_or_harmless(
    field: slice, value: bytes, registry: Registry, tmp_path: Path
) -> None:
    digest, description = described({"file": HONEST})
    path = archive(tmp_path / "x.tar", digest, description, {SHA256: CONTENT})
    content = bytearray(path.read_bytes())
    for start in (0, 1024, 2048, 3072):
        changed = bytearray(content)
        header = changed[start : start + 512]
        header[field] = value * (field.stop - field.start)
        if field.start != 148:  # a checksum that fits, or the header would be refused for it alone
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\x00 " % sum(header)
        changed[start : start + 512] = header
        path.write_bytes(changed)
        try:
            version = import_version(registry, path, name=f"at{start}")
        except RegistryError:
            continue
        assert registry.verify(str(version)).ok
        assert list(registry.get(version.digest).files) == ["file"]
    assert Registry.examine(registry.root) == []
