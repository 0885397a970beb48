"""An export holds a version whole; an import trusts no byte of it, and publishes all or nothing."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from registry import (
    Artifact,
    InvalidNameError,
    Registry,
    RegistryError,
    TargetExistsError,
    Version,
    export_version,
    import_version,
)

Members = dict[str, bytes]


@pytest.fixture
def published(registry: Registry, make_folder) -> Version:
    statistics = registry.add_artifact("statistics", make_folder({"s": b"statistics"}), ["ab" * 32], {"seed": 1})
    files = {"weights": b"weights" * 1000, "config": b"{}", "again": b"{}", "empty": b""}
    checkpoint = registry.add_artifact("checkpoint", make_folder(files), [statistics.digest])
    report = registry.add_artifact("evaluation", make_folder({"report": b"good"}), [checkpoint.digest])
    return registry.publish("model", checkpoint, report, "made at night")


@pytest.fixture
def exported(registry: Registry, published: Version, tmp_path: Path) -> Path:
    return export_version(registry, "model", tmp_path / "model.tar").path


@pytest.fixture
def other(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "other")


def members_of(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def write(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_a_version_comes_over_whole(registry: Registry, published: Version, exported: Path, other: Registry) -> None:
    version = import_version(other, exported)
    assert (str(version), version.digest, version.note) == ("model:1", published.digest, "made at night")
    assert version.report_digest == published.report_digest
    assert other.verify("model").ok
    mine, theirs = (each.lineage(published.digest) for each in (registry, other))
    assert mine == theirs
    assert theirs.missing == ("ab" * 32,)
    assert Registry.examine(other.root) == []
    assert import_version(other, exported) == version, "again is the same version"
    assert str(import_version(other, exported, name="renamed")) == "renamed:1"
    assert not other.store.has(theirs.artifacts[1].files["s"]), "files of ancestors stay behind"


def test_equal_versions_give_equal_files(registry: Registry, exported: Path, tmp_path: Path) -> None:
    again = export_version(registry, "model:1", tmp_path / "again.tar").path
    assert again.read_bytes() == exported.read_bytes()
    assert [name.partition("/")[0] for name in members_of(exported)] == [
        "bitsmith-export.json",
        *["artifacts"] * 3,
        *["blobs"] * 4,
    ]


def test_an_import_takes_the_next_number(exported: Path, other: Registry, make_folder) -> None:
    other.publish("model", other.add_artifact("checkpoint", make_folder({"a": b"1"})))
    assert str(import_version(other, exported)) == "model:2"


def test_nothing_is_overwritten(registry: Registry, exported: Path) -> None:
    before = exported.read_bytes()
    with pytest.raises(TargetExistsError):
        export_version(registry, "model", exported)
    assert exported.read_bytes() == before


def test_the_next_export_removes_what_a_killed_one_left(registry: Registry, published: Version, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".0123456789abcdef.partial").write_bytes(b"half")
    (tmp_path / "out" / ".theirs.partial").write_bytes(b"not ours")
    export_version(registry, "model", tmp_path / "out" / "model.tar")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.tar", ".theirs.partial"}


@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_a_damaged_version_is_not_exported(damage: str, registry: Registry, published: Version, tmp_path: Path) -> None:
    blob = registry.path(registry.get(published.digest), "weights")
    blob.chmod(0o644)
    blob.unlink() if damage == "delete" else blob.write_bytes(b"Weights" + blob.read_bytes()[7:])
    with pytest.raises(RegistryError, match="missing" if damage == "delete" else "damaged"):
        export_version(registry, "model", tmp_path / "out" / "model.tar")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_truncated_file_is_refused_wherever_it_ends(exported: Path, other: Registry, tmp_path: Path) -> None:
    content = exported.read_bytes()
    for length in range(0, len(content) - 10 * 1024, 700):
        (tmp_path / "cut.tar").write_bytes(content[:length])
        with pytest.raises(RegistryError):
            import_version(other, tmp_path / "cut.tar")
        assert other.versions() == []
    assert list(other.store.unfinished()) == []


def test_every_changed_byte_is_refused_or_harmless(exported: Path, other: Registry, tmp_path: Path) -> None:
    content = bytearray(exported.read_bytes())
    for place in range(0, len(content), 97):
        changed = bytearray(content)
        changed[place] ^= 0x21
        (tmp_path / "changed.tar").write_bytes(changed)
        try:
            version = import_version(other, tmp_path / "changed.tar", name=f"at{place}")
        except RegistryError:
            assert not any(version.name == f"at{place}" for version in other.versions())
        else:
            assert other.verify(str(version)).ok
            assert {"weights", "config", "again", "empty"} == set(other.get(version.digest).files)


def test_what_is_no_export_is_refused(exported: Path, other: Registry, tmp_path: Path) -> None:
    members = members_of(exported)
    head = "bitsmith-export.json"
    weights = next(name for name, content in members.items() if content.startswith(b"weights"))
    description = next(name for name in members if name.startswith("artifacts/"))
    newer = json.dumps(json.loads(members[head]) | {"format": 2}).encode()
    unsafe = json.loads(members[head])
    unsafe["version"]["name"] = "../../etc"
    cases: dict[str, Members] = {
        "nothing": {},
        "another head": {"head.json": b"{}"} | members,
        "a newer format": members | {head: newer},
        "an unsafe name": members | {head: json.dumps(unsafe).encode()},
        "no JSON": members | {head: b"{"},
        "a list": members | {head: b"[]"},
        "a name outside": members | {"../evil": b"x"},
        "an absolute name": members | {"/tmp/evil": b"x"},
        "an unknown blob": members | {"blobs/" + "0" * 64: b"x"},
        "a missing blob": {name: content for name, content in members.items() if name != weights},
        "a longer blob": members | {weights: members[weights] + b"x"},
        "a shorter blob": members | {weights: members[weights][:-1]},
        "another description": members | {description: members[description].replace(b"seed", b"need", 1) + b" "},
    }
    unchanged = Registry(tmp_path / "unchanged")
    assert unchanged.verify(str(import_version(unchanged, write(tmp_path / "same.tar", members)))).ok
    for what, content in cases.items():
        case = write(tmp_path / "case.tar", content)
        with pytest.raises(RegistryError):
            import_version(other, case)
        assert other.versions() == [], what
    assert not (tmp_path / "evil").exists()
    with pytest.raises(InvalidNameError):
        import_version(other, exported, name="../x")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_and_devices_are_refused(kind: bytes, exported: Path, other: Registry, tmp_path: Path) -> None:
    members = members_of(exported)
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if name.startswith("blobs/"):
                member.type, member.linkname = kind, "/etc/hostname"
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with pytest.raises(RegistryError, match="no plain file"):
        import_version(other, tmp_path / "links.tar")
    assert other.versions() == []


def test_a_killed_import_completes_when_run_again(exported: Path, other: Registry, monkeypatch) -> None:
    calls = iter(range(100))
    record = Registry.record

    def killed(self, artifact: Artifact) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        record(self, artifact)

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            import_version(other, exported)
    assert other.versions() == []
    assert str(import_version(other, exported)) == "model:1"
    assert other.verify("model").ok
