"""A store at a URL is the truth for all who share it, the local one a cache; nothing is published that is not there."""

import os
import shutil
import sys
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry as loaded

from registry import Artifact, IntegrityError, NotFoundError, Registry, RegistryError, Store
from registry.artifact import FileEntry
from registry.remote import RemoteBlobs
from tests.registry.at_url import registry_at
from tests.registry.s3_server import S3Server
from tests.registry.silent_server import silent_server


def store_at(url: str, cache: Path) -> Store:
    remote = RemoteBlobs(url)
    remote.claim("the index of the tests")
    return Store(cache, remote)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.bin"
    path.write_bytes(os.urandom(300_000))
    return path


def files_at(url: str) -> dict[str, bytes]:
    """Path below the store -> content, without the marker."""
    fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
    return {place.removeprefix(f"{root}/"): fs.cat_file(place) for place in fs.find(root) if place != f"{root}/index"}


def damage(url: str, entry: FileEntry, how: str) -> None:
    fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
    place = f"{root}/sha256/{entry.sha256[:2]}/{entry.sha256}"
    content = fs.cat_file(place)
    if how == "delete":
        fs.rm_file(place)
    else:
        cut = content[: len(content) // 2]
        fs.pipe_file(place, cut if how == "truncate" else content[:-1] + bytes([content[-1] ^ 1]))


def name(entry: FileEntry) -> str:
    return f"sha256/{entry.sha256[:2]}/{entry.sha256}"


@pytest.mark.parametrize("move", [False, True])
def test_what_one_host_adds_another_reads(url: str, source: Path, tmp_path: Path, move: bool) -> None:
    content = source.read_bytes()
    ours, theirs = store_at(url, tmp_path / "ours"), store_at(url, tmp_path / "theirs")
    entry = ours.add(source, move=move)
    assert files_at(url) == {name(entry): content}
    assert theirs.has(entry)
    theirs.verify(entry, "source")
    assert list(theirs.blobs()) == [], "neither asks for a copy"
    theirs.materialize(Artifact.create("plan", {"a/b": entry, "c": entry}), tmp_path / "out")
    assert (tmp_path / "out" / "a" / "b").read_bytes() == content
    assert [path.stat().st_mode & 0o777 for path in theirs.blobs()] == [0o444]
    assert list(theirs.unfinished()) == []


def test_equal_content_is_sent_once(bucket: str, s3_server: S3Server, source: Path, tmp_path: Path) -> None:
    ours, theirs = store_at(bucket, tmp_path / "ours"), store_at(bucket, tmp_path / "theirs")
    s3_server.requests.clear()
    entry = ours.add(source)
    assert [request.split()[0] for request in s3_server.requests].count("PUT") == 2, "sent, then copied to its name"
    s3_server.requests.clear()
    assert theirs.add(source) == entry
    assert [request.split()[0] for request in s3_server.requests] == ["HEAD", "HEAD"], "the server tells its hash"
    assert list(files_at(bucket)) == [name(entry)]


def test_a_file_that_is_sent_in_parts_arrives(bucket: str, s3_server: S3Server, tmp_path: Path, monkeypatch) -> None:
    """s3fs sends more than 100 MB in parts of 50; here more than 10 in parts of 5."""
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 << 20)
    (tmp_path / "large").write_bytes(os.urandom(11 << 20))
    ours, theirs = store_at(bucket, tmp_path / "ours"), store_at(bucket, tmp_path / "theirs")
    s3_server.requests.clear()
    entry = ours.add(tmp_path / "large")
    assert sum(request.startswith("PUT") and "/incoming/" in request for request in s3_server.requests) == 3
    assert theirs.is_sound(entry)


def test_a_file_that_is_copied_in_parts_is_not_sent_again(
    bucket: str, s3_server: S3Server, source: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("registry.remote.MOST_BYTES_OF_A_COPY", 0)
    monkeypatch.setattr("s3fs.core.MANAGED_COPY_THRESHOLD", 0)
    ours = store_at(bucket, tmp_path / "ours")
    entry = ours.add(source)
    s3_server.requests.clear()
    assert ours.add(source) == entry
    assert {request.split()[0] for request in s3_server.requests} == {"HEAD", "GET"}, "it is read back"


def test_the_cache_may_be_deleted(url: str, source: Path, tmp_path: Path) -> None:
    entry = store_at(url, tmp_path / "ours").add(source)
    shutil.rmtree(tmp_path / "ours" / "blobs")
    assert store_at(url, tmp_path / "ours").open(entry.sha256).read() == source.read_bytes()


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_damage_there_is_found_and_adding_again_heals_it(url: str, source: Path, tmp_path: Path, how: str) -> None:
    ours, theirs = store_at(url, tmp_path / "ours"), store_at(url, tmp_path / "theirs")
    entry = ours.add(source)
    damage(url, entry, how)
    expected = NotFoundError if how == "delete" else IntegrityError
    for store in (ours, theirs):
        with pytest.raises(expected, match=url):
            store.verify(entry, "weights.bin")
        assert store.has(entry) == (how == "flip")
    with pytest.raises(expected, match=url):
        theirs.path(entry.sha256)
    assert not theirs.is_sound(entry)
    assert list(theirs.blobs()) == list(theirs.unfinished()) == []
    theirs.add(source)
    for store in (ours, theirs):
        store.verify(entry, "weights.bin")
    assert files_at(url) == {name(entry): source.read_bytes()}


def test_bytes_that_rot_under_the_hash_that_the_server_keeps_are_found(
    bucket: str, make_folder, tmp_path: Path
) -> None:
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    registry = registry_at(bucket, tmp_path / "registry")
    entry = registry.add_artifact("matrices", make_folder({"weights": b"weights"})).files["weights"]
    bucket_name, _, prefix = bucket.removeprefix("s3://").partition("/")
    kept = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].get_object(bucket_name, f"{prefix}/{name(entry)}")
    kept.value = b"weighty"
    with pytest.raises(IntegrityError, match="expected sha256"):
        registry.store.verify(entry, "weights")
    assert not Store(tmp_path / "theirs", RemoteBlobs(bucket)).is_sound(entry)
    assert [found.is_repaired for found in Registry.examine(registry.root, repair=True)] == [True]
    assert files_at(bucket) == {name(entry): b"weights"}


def test_bytes_that_change_on_their_way_get_no_name(source: Path, tmp_path: Path) -> None:
    class LossyFileSystem(MemoryFileSystem):
        protocol = "lossy"

        def put_file(self, lpath, rpath, **options):
            super().pipe_file(rpath, Path(lpath).read_bytes()[::-1])

    fsspec.register_implementation("lossy", LossyFileSystem, clobber=True)
    url = "lossy://bitsmith"
    store = store_at(url, tmp_path / "ours")
    with pytest.raises(IntegrityError, match=r"source\.bin|incoming"):
        store.add(source)
    assert files_at(url) == {}
    assert list(store.blobs()) == list(store.unfinished()) == []


def test_a_server_that_goes_down_at_any_moment_leaves_nothing_half_there(
    bucket: str, s3_server: S3Server, make_folder, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    registry = registry_at(bucket, tmp_path / "registry")
    contents = {"a": b"first" * 1000, "b": b"second" * 1000}
    folder = make_folder(contents)
    entries = {path: FileEntry.of_bytes(content) for path, content in contents.items()}
    refused = 0
    for until_down in range(100):
        s3_server.until_down = until_down
        try:
            artifact = registry.add_artifact("checkpoint", folder)
        except RegistryError:
            refused += 1
            s3_server.until_down = None
            there = files_at(bucket)
            assert all(there.get(name(e), contents[path]) == contents[path] for path, e in entries.items())
            assert registry._index.digests() == [], "not recorded, so that it cannot be published"
            assert list(registry.store.unfinished()) == []
            registry.store.remote.sweep(set(), time.time() + 5, dry_run=False)
        else:
            break
    s3_server.until_down = None
    assert refused > 10
    assert str(registry.publish("model", artifact)) == "model:1"
    assert sorted(files_at(bucket)) == sorted(map(name, entries.values())), "and nothing else"


def test_what_is_only_in_the_cache_is_not_published(bucket: str, make_folder, tmp_path: Path) -> None:
    registry = registry_at(bucket, tmp_path / "registry")
    artifact = registry.add_artifact("checkpoint", make_folder({"a": b"1", "b": b"2"}))
    damage(bucket, artifact.files["b"], "delete")
    with pytest.raises(NotFoundError, match="b of checkpoint"):
        registry.record(artifact)


def test_work_is_not_lost_where_its_result_cannot_be_sent(bucket: str, s3_server: S3Server, tmp_path: Path) -> None:
    registry = registry_at(bucket, tmp_path / "registry")
    built = []

    def build(workdir: Path) -> None:
        built.append(workdir)
        (workdir / "out").mkdir()
        (workdir / "out" / "file").write_bytes(b"statistics")
        s3_server.until_down = 0

    with pytest.raises(RegistryError, match=bucket):
        registry.step("statistics", [], {"seed": 0}, build)
    s3_server.until_down = None
    made = registry.step("statistics", [], {"seed": 0}, build)
    assert len(built) == 1
    assert list(files_at(bucket)) == [name(made.files["file"])]


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_the_doctor_mends_each_copy_from_the_other(url: str, make_folder, tmp_path: Path, how: str) -> None:
    registry = registry_at(url, tmp_path / "registry")
    artifact = registry.add_artifact("checkpoint", make_folder({"config": b"{}", "weights": b"weights"}))
    registry.publish("model", artifact)
    assert Registry.examine(registry.root) == []
    entry = artifact.files["weights"]

    damage(url, entry, how)
    (found,) = Registry.examine(registry.root)
    assert ("weights" in found.what, found.is_repaired) == (True, False)
    assert "doctor --repair" in found.advice
    (found,) = Registry.examine(registry.root, repair=True)
    assert found.is_repaired
    assert Registry.examine(registry.root) == []

    if how != "delete":  # a copy that is missing is fetched
        cached = registry.store.path(entry.sha256)
        cached.chmod(0o644)
        cached.write_bytes(b"weighty" if how == "flip" else b"w")
        assert not registry.verify("model").ok
        assert [found.is_repaired for found in Registry.examine(registry.root, repair=True)] == [True]
        assert registry.verify("model").ok

    damage(url, entry, how)
    shutil.rmtree(registry.root / "blobs")
    (found,) = Registry.examine(registry.root, repair=True)
    assert not found.is_repaired
    assert "It belongs to model:1" in found.advice
    assert name(entry) not in files_at(url)
    assert (f"damaged/{entry.sha256}" in files_at(url)) == (how != "delete")
    Registry(registry.root).add_artifact("checkpoint", make_folder({"weights": b"weights"}))
    assert Registry.examine(registry.root) == []


def test_a_damaged_result_is_made_again(bucket: str, tmp_path: Path) -> None:
    registry = registry_at(bucket, tmp_path / "registry")

    def build(workdir: Path) -> None:
        (workdir / "out").mkdir()
        (workdir / "out" / "file").write_bytes(b"statistics")

    made = registry.step("statistics", [], {"seed": 0}, build)
    damage(bucket, made.files["file"], "flip")
    shutil.rmtree(registry.root / "blobs")
    assert Registry(registry.root).step("statistics", [], {"seed": 0}, build) == made
    assert Registry.examine(registry.root) == []


def test_garbage_goes_there_too_and_the_rest_stays(url: str, make_folder, tmp_path: Path) -> None:
    registry = registry_at(url, tmp_path / "registry")
    kept = registry.add_artifact("checkpoint", make_folder({"a": b"weights", "same": b"same"}))
    registry.publish("model", kept)
    garbage = registry.add_artifact("matrices", make_folder({"g": b"garbage", "same": b"same"}))
    registry._uses.close()  # this process needs none of it
    fs, root = fsspec.url_to_fs(url)
    fs.pipe_file(f"{root}/incoming/half", b"123")
    before = files_at(url)
    assert registry.collect_garbage(grace_seconds=3600).num_blobs == 0
    promised = registry.collect_garbage(grace_seconds=-5, dry_run=True)
    assert files_at(url) == before
    found = registry.collect_garbage(grace_seconds=-5)
    assert found == promised
    assert found.artifacts == (garbage,)
    assert (found.num_blobs, found.size_bytes) == (2, len(b"garbage") + 3)
    assert sorted(files_at(url)) == sorted(name(entry) for entry in kept.files.values())
    assert {path.name for path in registry.store.blobs()} == {entry.sha256 for entry in kept.files.values()}
    assert registry.verify("model").ok


def test_two_hosts_share_a_registry(bucket: str, database: str | None, make_folder, tmp_path: Path) -> None:
    shared = database or f"sqlite:///{tmp_path}/shared.sqlite"
    here, there = (registry_at(bucket, tmp_path / host, shared) for host in ("here", "there"))
    files = {"config": b"{}", "weights": b"weights"}
    first = here.add_artifact("checkpoint", make_folder(files))
    here.publish("model", first)
    there.materialize(there.get(there.version("model").digest), tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    second = there.add_artifact("checkpoint", make_folder({"config": b"{}", "weights": b"better"}))
    assert str(there.publish("model", second)) == "model:2"
    there.alias("model", "production")
    assert len(files_at(bucket)) == 3, "what two versions share is there once"
    assert here.verify("model@production").ok
    here.add_artifact("matrices", make_folder({"g": b"garbage"}))
    assert [Registry.examine(registry.root) for registry in (here, there)] == [[], []]
    assert len(list((tmp_path / "here" / "records" / "versions" / "model").iterdir())) == 2, "each has all records now"
    assert there.collect_garbage(grace_seconds=-5).num_blobs == 1
    assert [registry.verify(f"model:{number}").ok for registry in (here, there) for number in (1, 2)] == [True] * 4
    with pytest.raises(RegistryError, match="another registry"):
        registry_at(bucket, tmp_path / "stranger")


def test_a_bucket_that_is_missing_is_no_lost_blob(s3_server: S3Server, source: Path, tmp_path: Path) -> None:
    url = "s3://no-such-bucket/models"
    with pytest.raises(RegistryError, match=f"{url} cannot be used.*does not exist"):
        RemoteBlobs(url).claim("index")
    for use in (Store.add, lambda store, path: store.has(FileEntry.of_bytes(b"1"))):
        with pytest.raises(RegistryError, match=f"no store at {url}.*init --store") as refused:
            use(Store(tmp_path / "ours", RemoteBlobs(url)), source)
        assert not isinstance(refused.value, NotFoundError)
    assert not any(request.startswith("PUT /no-such-bucket ") for request in s3_server.requests), "none is made"


def test_a_server_that_is_silent_is_given_up_after_a_few_tries(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six of s3fs's 15 seconds, so that a flow's run says so within two minutes."""
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    monkeypatch.setattr("s3fs.S3FileSystem.read_timeout", 0.1)
    with silent_server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        with pytest.raises(RegistryError, match=r"s3://silent/models cannot be used \(Read timeout.*Check the network"):
            RemoteBlobs("s3://silent/models").has(FileEntry.of_bytes(b"1"))
    assert len(server.taken) == 6


def test_wrong_credentials_are_named(bucket: str, source: Path, tmp_path: Path, monkeypatch) -> None:
    store = store_at(bucket, tmp_path / "ours")
    with monkeypatch.context() as patch:
        patch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)  # from now on the server knows nobody
        with pytest.raises(RegistryError, match=f"{bucket} cannot be used .*credentials"):
            store.add(source)
    assert files_at(bucket) == {}


def test_a_server_that_is_gone_is_named(bucket: str, tmp_path: Path, monkeypatch) -> None:
    server = S3Server()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.environment["AWS_ENDPOINT_URL"])
    server.close()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(RegistryError, match=f"{bucket} cannot be used .*Check the network"):
        Store(tmp_path / "ours", RemoteBlobs(bucket)).has(FileEntry.of_bytes(b"1"))


@pytest.mark.parametrize(
    "url", ["", "models", "s3://", "file:///", "/mnt/models", "simplecache::s3://bucket", "s3:bucket/models"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(RegistryError, match="must be given as a URL"):
        RemoteBlobs(url)


@pytest.mark.parametrize(
    "url", ["s3://key:s3cret@bucket/models", "s3://key:s3c/ret@bucket", "sftp://ann:s3cret@host/x"]
)
def test_a_password_in_the_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(RegistryError, match="holds a password") as refused:
        RemoteBlobs(url)
    assert "s3c" not in str(refused.value)


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RegistryError, match=r"needs gcsfs.*`pip install gcsfs`"):
        RemoteBlobs("gs://bucket/models").claim("index")
    monkeypatch.delitem(loaded, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(RegistryError, match=r"pip install 'bitsmith\[s3\]'"):
        RemoteBlobs("s3://bucket/models").claim("index")
    with pytest.raises(RegistryError, match="nosuch://x cannot be used"):
        RemoteBlobs("nosuch://x").claim("index")
