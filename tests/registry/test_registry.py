"""Laws of names and versions: immutable, without a gap, found again or refused with a hint."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from registry import (
    AmbiguousDigestError,
    Artifact,
    IntegrityError,
    InvalidNameError,
    NotFoundError,
    Registry,
    RegistryError,
)

ROOT = Path(__file__).parents[2]


def test_equal_folders_have_equal_digests_in_any_registry(registry: Registry, make_folder, tmp_path: Path):
    files = {"a": b"1", "b/c": b"2"}
    one = registry.add_artifact("plan", make_folder(files), metadata={"x": 1})
    two = Registry(tmp_path / "second").add_artifact("plan", make_folder(files), metadata={"x": 1}, move=True)
    assert one == two
    assert registry.add_artifact("plan", make_folder(files | {"a": b"2"}), metadata={"x": 1}) != one


def test_an_artifact_is_found_by_digest_and_prefix(registry: Registry, checkpoint: Artifact):
    again = Registry(registry.root).get(checkpoint.digest)
    assert again == checkpoint
    assert (again.kind, again.parents, dict(again.metadata)) == ("checkpoint", ("ab" * 32,), {"bits": 3.0})
    assert registry.find(checkpoint.digest[:6]) == checkpoint
    assert registry.path(checkpoint, "tables/plan.json").read_bytes() == b"[1, 2, 3]"
    with pytest.raises(NotFoundError, match=r"Did you mean config\.json"):
        registry.path(checkpoint, "confg.json")
    with pytest.raises(NotFoundError):
        registry.get("0" * 64)
    with pytest.raises(NotFoundError):
        registry.find("%")


def test_a_short_prefix_of_two_artifacts_is_ambiguous(registry: Registry, make_folder):
    for number in range(2):
        registry.add_artifact("plan", make_folder({"a": bytes([number])}))
    with pytest.raises(AmbiguousDigestError, match="2 artifacts start with"):
        registry.find("")


def test_links_and_empty_folders_are_refused(registry: Registry, make_folder, tmp_path: Path):
    folder = make_folder({"a": b"1"})
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(RegistryError, match="link"):
        registry.add_artifact("plan", folder)
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(RegistryError, match="nothing to add"):
            registry.add_artifact("plan", nothing)


def test_versions_count_from_one_for_each_name(registry: Registry, checkpoint: Artifact, make_folder):
    other = registry.add_artifact("checkpoint", make_folder({"a": b"other"}))
    report = registry.add_artifact("evaluation", make_folder({"report.json": b"{}"}))
    first = registry.publish("model", checkpoint, report, "first")
    assert (str(first), first.report_digest, first.note) == ("model:1", report.digest, "first")
    assert str(registry.publish("model", other)) == "model:2"
    assert registry.publish("model", checkpoint, note="again") == first
    assert str(registry.publish("another", checkpoint)) == "another:1"
    assert registry.version("model:1") == first
    assert registry.version("model").digest == other.digest
    assert [str(version) for version in registry.versions()] == ["another:1", "model:1", "model:2"]


def test_unknown_versions_name_what_is_near(registry: Registry, checkpoint: Artifact):
    with pytest.raises(NotFoundError, match="has none yet"):
        registry.version("smollm")
    registry.publish("smollm2-3bpw", checkpoint)
    with pytest.raises(NotFoundError, match="Did you mean smollm2-3bpw"):
        registry.version("smolm2-3bpw")
    with pytest.raises(NotFoundError, match="smollm2-3bpw:1"):
        registry.version("smollm2-3bpw:7")


@pytest.mark.parametrize("name", ["", "-a", ".a", "a/b", "a b", "ä", "a" * 97, "a:b:1", "a:0", "a:", "a:x"])
def test_malformed_names_are_refused(registry: Registry, name: str):
    with pytest.raises(InvalidNameError):
        registry.version(name)


def test_names_that_some_file_system_takes_for_one_are_refused(registry: Registry, checkpoint: Artifact):
    registry.publish("Tiny", checkpoint)
    assert str(registry.publish("Tiny", checkpoint)) == "Tiny:1"
    with pytest.raises(InvalidNameError, match="'tiny' differs from 'Tiny', which is here already, in the case"):
        registry.publish("tiny", checkpoint)


def test_what_is_not_in_the_registry_cannot_be_published(registry: Registry, checkpoint: Artifact, tmp_path: Path):
    with pytest.raises(NotFoundError):
        Registry(tmp_path / "empty").publish("model", checkpoint)
    with pytest.raises(InvalidNameError):
        registry.publish("a:1", checkpoint)


def test_lineage_goes_up_to_what_is_not_here(registry: Registry, make_folder):
    root = registry.add_artifact("statistics", make_folder({"s": b"1"}), ["ab" * 32])
    left = registry.add_artifact("costs", make_folder({"c": b"2"}), [root.digest])
    right = registry.add_artifact("plan", make_folder({"p": b"3"}), [left.digest])
    leaf = registry.add_artifact("checkpoint", make_folder({"w": b"4"}), [right.digest, root.digest])
    lineage = registry.lineage(leaf.digest)
    assert lineage.artifacts[0] == leaf
    assert set(lineage.artifacts[1:3]) == {right, root}
    assert lineage.artifacts[3] == left
    assert lineage.missing == ("ab" * 32,)


def test_verify_names_every_bad_file(registry: Registry, checkpoint: Artifact):
    registry.publish("model", checkpoint)
    sound = registry.verify("model")
    assert sound.ok
    assert sound.num_files == 3
    assert sound.size_bytes == checkpoint.size_bytes
    sound.raise_if_damaged()
    blob = registry.path(checkpoint, "config.json")
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes().replace(b"64", b"65"))
    registry.path(checkpoint, "model.safetensors").unlink()
    bad = registry.verify("model:1")
    assert bad.missing == ("model.safetensors",)
    assert list(bad.damaged) == ["config.json"]
    with pytest.raises(IntegrityError, match=r"model\.safetensors \(missing\), config\.json \(changed\)"):
        bad.raise_if_damaged()


def test_verify_reads_the_report_and_the_records_too(registry: Registry, make_folder):
    statistics = registry.add_artifact("statistics", make_folder({"s": b"1"}), ["ab" * 32])
    made = registry.add_artifact("checkpoint", make_folder({"w": b"2"}), [statistics.digest])
    report = registry.add_artifact("report", make_folder({"index.html": b"3", "heat.png": b"4"}), [made.digest])
    registry.publish("model", made, report)
    sound = registry.verify("model")
    assert (sound.ok, sound.num_files, sound.num_report_files, sound.num_records) == (True, 1, 2, 3)
    registry.path(report, "index.html").unlink()
    blob = registry.path(report, "heat.png")
    blob.chmod(0o644)
    blob.write_bytes(b"5")
    registry._index.records.artifact_path(statistics.digest).write_text("{")
    registry._index.records.artifact_path(made.digest).unlink()
    bad = registry.verify("model")
    assert bad.missing == (f"records/{made.digest[:12]}", "report/index.html")
    assert set(bad.damaged) == {f"records/{statistics.digest[:12]}", "report/heat.png"}
    Registry.examine(registry.root, repair=True)
    assert "records/" not in str((registry.verify("model").missing, registry.verify("model").damaged))


PUBLISH = """
import sys
from pathlib import Path
from registry import Registry
registry = Registry(Path(sys.argv[1]))
artifacts = []
for number in range(int(sys.argv[3])):
    folder = Path(sys.argv[1]).parent / f"work-{sys.argv[2]}-{number}"
    folder.mkdir()
    (folder / "file").write_text(f"{sys.argv[2]} {number}")
    artifacts.append(registry.add_artifact("plan", folder))
print("ready", flush=True)
sys.stdin.readline()
for artifact in artifacts:
    print(registry.publish("model", artifact).number, flush=True)
"""


def test_processes_that_publish_at_once_get_every_number_once(registry: Registry):
    num_processes, num_each = 4, 25
    command = [sys.executable, "-c", PUBLISH, str(registry.root)]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen([*command, str(p), str(num_each)], stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        for p in range(num_processes)
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    numbers = [int(line) for process in processes for line in process.communicate(timeout=60)[0].split()]
    assert [process.returncode for process in processes] == [0] * num_processes
    assert sorted(numbers) == list(range(1, num_processes * num_each + 1))
    assert len({version.digest for version in registry.versions()}) == len(numbers)


def test_the_registry_may_move(registry: Registry, checkpoint: Artifact, tmp_path: Path):
    registry.publish("model", checkpoint)
    shutil.move(registry.root, tmp_path / "moved")
    assert Registry(tmp_path / "moved").verify("model").ok


def test_importing_the_package_loads_neither_database_nor_hub_nor_torch():
    code = (
        "import sys, registry; heavy = {'torch', 'sqlalchemy', 'huggingface_hub', 'transformers'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 0
