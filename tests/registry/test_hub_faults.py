"""The line is cut at every request of push and pull, the server is busy, others are faster: whole or not at all."""

import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from registry import (
    Artifact,
    HubAuthError,
    HubConflictError,
    HubError,
    HubRaceError,
    HubUnavailableError,
    IntegrityError,
    Patience,
    Registry,
    Version,
    push,
)
from registry.hub_client import limit_waits
from registry.patience import ONCE
from registry.publication import MANIFEST

sys.path.insert(0, str(Path(__file__).parent))
from hub_server import WRITE_TOKEN, Fault, HubServer, Repo, StoredFile
from hub_steps import REPO, fetch, send

from tests.registry.silent_server import silent_server

FIRST = {".gitattributes"}


@pytest.fixture
def waits() -> list[float]:
    """How long `patient` waited, in seconds."""
    return []


@pytest.fixture
def patient(waits: list[float]) -> Patience:
    return Patience(num_tries=4, first_seconds=1.0, longest_seconds=60.0, sleep=waits.append)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A registry with a version `tiny`, which many pushes may read."""
    root = tmp_path_factory.mktemp("local")
    (root / "files").mkdir()
    (root / "files" / "config.json").write_bytes(b'{"hidden_size": 64}')
    (root / "files" / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    registry = Registry(root / "registry")
    registry.publish("tiny", registry.add_artifact("checkpoint", root / "files"))
    return registry


def attempt(work: Callable[[], object]) -> bool:
    """Did it end well? If not, it says that the server was away."""
    try:
        work()
    except HubUnavailableError:
        return False
    return True


def cuts(num_requests: int) -> list[tuple[int, str]]:
    return [(number, when) for number in range(num_requests) for when in ("before", "after")]


def test_a_push_cut_at_any_request_moves_nothing_and_is_completed_by_the_next(local: Registry, hub: HubServer) -> None:
    whole = {*FIRST, "README.md", MANIFEST, "config.json", "model.safetensors"}
    send(local, hub)
    num_requests, num_failed = len(hub.requests), 0
    assert num_requests > 10
    for cut in cuts(num_requests):
        hub.repos.clear()
        hub.lfs_objects.clear()
        hub.requests.clear()
        hub.cut_at = cut
        is_done = attempt(lambda: send(local, hub))
        num_failed += not is_done
        repo = hub.repos.get(REPO)
        if repo and not is_done:
            assert set(hub.head(REPO)) in (FIRST, whole), cut
            assert all(set(repo.commits[commit]) == whole for commit in repo.tags.values()), cut
        hub.cut_at = None
        result = send(local, hub)
        repo = hub.repos[REPO]
        assert repo.tags == {"v1": result.commit}, cut
        assert len(list(repo.history(repo.branches["main"]))) == 2, cut
        assert set(hub.head(REPO)) == whole, cut
    assert num_failed > 10  # the client goes on by itself after some


def test_the_staging_branch_of_a_killed_push_goes_with_the_next(local: Registry, hub: HubServer) -> None:
    def cut_at_main(repo: Repo, branch: str) -> None:
        if branch == "main":
            raise ConnectionAbortedError

    hub.before_commit = cut_at_main
    hub.faults["DELETE /api/models/"] = 500  # as if nobody were left to tidy up
    assert not attempt(lambda: send(local, hub))
    repo = hub.repos[REPO]
    assert [branch.startswith("bitsmith-staging-") for branch in repo.branches if branch != "main"] == [True]
    repo.branches["bitsmith-staging-0123456789ab-of-another"] = repo.branches["main"]
    hub.faults.clear()
    hub.before_commit = lambda repo, branch: None
    send(local, hub)
    assert set(repo.branches) == {"main", "bitsmith-staging-0123456789ab-of-another"}


def test_a_push_killed_between_its_commit_and_its_tag_leaves_no_branch(local: Registry, hub: HubServer) -> None:
    hub.faults |= {"DELETE /api/models/": 500, f"POST /api/models/{REPO}/tag": 500}
    assert not attempt(lambda: send(local, hub))
    repo = hub.repos[REPO]
    assert len(repo.branches) == 2
    assert len(list(repo.history(repo.branches["main"]))) == 2
    hub.faults.clear()
    send(local, hub)
    assert set(repo.branches) == {"main"}
    assert repo.tags == {"v1": repo.branches["main"]}


def test_a_pull_cut_at_any_request_shows_nothing_and_is_completed_by_the_next(
    local: Registry, hub: HubServer, tmp_path: Path
) -> None:
    digest = local.version("tiny").digest
    send(local, hub)
    hub.requests.clear()
    fetch(Registry(tmp_path / "clean"), hub)
    num_requests, num_failed = len(hub.requests), 0
    for number, cut in enumerate(cuts(num_requests)):
        mine = Registry(tmp_path / f"mine-{number}")
        hub.requests.clear()
        hub.cut_at = cut
        is_done = attempt(lambda mine=mine: fetch(mine, hub))
        num_failed += not is_done
        assert is_done or mine.versions() == [], cut
        hub.cut_at = None
        assert fetch(mine, hub).digest == digest
        assert mine.verify("tiny-3bpw").ok
        assert not list((mine.root / "pulls").iterdir()), cut
    assert num_failed > 0


def test_a_pull_goes_on_where_the_line_broke(local: Registry, hub: HubServer, other: Registry) -> None:
    send(local, hub)
    entry = local.get(local.version("tiny").digest).files["model.safetensors"]
    part = other.root / "pulls" / f"{entry.sha256}.part"
    part.parent.mkdir()
    part.write_bytes(local.store.path(entry.sha256).read_bytes()[:5000])
    fetch(other, hub)
    assert hub.ranges == ["bytes=5000-"]
    assert other.verify("tiny-3bpw").ok


def test_a_beginning_that_is_wrong_is_fetched_again(local: Registry, hub: HubServer, other: Registry) -> None:
    send(local, hub)
    entry = local.get(local.version("tiny").digest).files["model.safetensors"]
    part = other.root / "pulls" / f"{entry.sha256}.part"
    part.parent.mkdir()
    for wrong in (b"x" * 5000, b"x" * entry.size_bytes, b"x" * (entry.size_bytes + 1)):
        part.write_bytes(wrong)
        fetch(other, hub)
        assert other.verify("tiny-3bpw").ok
        other.store.set_aside(entry.sha256)


def test_a_body_that_ends_too_early_is_gone_on_with(local: Registry, hub: HubServer, other: Registry) -> None:
    send(local, hub)
    hub.cut_body_after_bytes = 10
    assert attempt(lambda: fetch(other, hub))
    assert other.verify("tiny-3bpw").ok


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("word", ["/repos/create", "/commit/", "/tag/", "/refs", "/branch/"])
def test_a_busy_server_is_asked_again(
    local: Registry, hub: HubServer, patient: Patience, waits: list[float], word: str, status: int
) -> None:
    hub.passing_faults = [Fault(word, status, {}), Fault(word, status, {})]
    result = send(local, hub, patience=patient)
    assert hub.repos[REPO].tags == {"v1": result.commit}
    assert len(waits) == 2
    assert 1.0 <= waits[0] <= 1.5
    assert 2.0 <= waits[1] <= 3.0


def test_the_wait_that_the_server_asks_for_is_kept(
    local: Registry, hub: HubServer, patient: Patience, waits: list[float]
) -> None:
    hub.passing_faults = [
        Fault("/commit/", 429, {"Retry-After": "17"}),
        Fault("/commit/", 429, {"RateLimit": '"api";r=0;t=41'}),
    ]
    send(local, hub, patience=patient)
    assert 17 <= waits[0] <= 26
    assert 41 <= waits[1] <= 62


def test_the_moment_that_the_server_names_is_waited_for(
    local: Registry, hub: HubServer, patient: Patience, waits: list[float]
) -> None:
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=50), usegmt=True)
    hub.passing_faults = [Fault("/commit/", 503, {"Retry-After": asked}) for asked in (moment, "soon")]
    send(local, hub, patience=patient)
    assert 20 <= waits[0] <= 75
    assert 2 <= waits[1] <= 3


def test_who_gave_no_token_is_told_so(local: Registry, hub: HubServer) -> None:
    hub.faults["/revision/"] = 401
    with pytest.raises(HubAuthError, match="No token was given, and alice/tiny-3bpw wants one"):
        fetch(local, hub, token=None)
    with pytest.raises(HubAuthError, match="does not know the token"):
        fetch(local, hub)


def test_a_wait_of_an_hour_is_left_to_the_user(
    local: Registry, hub: HubServer, patient: Patience, waits: list[float]
) -> None:
    hub.passing_faults = [Fault("/commit/", 429, {"Retry-After": "3600"})]
    with pytest.raises(HubUnavailableError, match="429"):
        send(local, hub, patience=patient)
    assert waits == []


def test_patience_ends(local: Registry, hub: HubServer, patient: Patience, waits: list[float]) -> None:
    hub.faults["/commit/"] = 503
    with pytest.raises(HubUnavailableError, match="503"):
        send(local, hub, patience=patient)
    assert len(waits) == patient.num_tries - 1
    assert set(hub.head(REPO)) == FIRST
    assert set(hub.repos[REPO].branches) == {"main"}


def test_a_server_that_is_silent_is_given_up(local: Registry, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session

    monkeypatch.setattr("registry.hub_client.MOST_SECONDS_SILENT", 0.2)
    close_session()
    try:
        with silent_server() as server:
            endpoint, patience = f"http://127.0.0.1:{server.port}", Patience(num_tries=2, first_seconds=0.01)
            with pytest.raises(HubUnavailableError, match=r"cannot be reached .*timed out"):
                push(local, "tiny", REPO, endpoint=endpoint, token=WRITE_TOKEN, patience=patience)
    finally:
        close_session()
    assert len(server.taken) == 2


def test_the_limit_outlives_a_client_that_is_closed_after_a_refused_connection(monkeypatch) -> None:
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import http_backoff

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    limit_waits()
    before = get_session()
    with pytest.raises(HTTPError, match="refused"):
        http_backoff("GET", "http://127.0.0.1:9/nothing", max_retries=1, base_wait_time=0.01)
    assert get_session() is not before
    assert [hook.__name__ for hook in get_session().event_hooks["request"]][-1] == "_limit_wait"


def test_no_try_begins_long_after_the_first_where_the_server_asks_for_none(waits: list[float]) -> None:
    patience = Patience(num_tries=100, first_seconds=10.0, most_seconds=35.0, sleep=waits.append)

    def silent() -> None:
        raise HubUnavailableError("silent")

    with pytest.raises(HubUnavailableError):
        patience.run(silent)
    assert len(waits) == 2, "10 to 15 and 20 to 30 seconds; the third would be 40"
    asked = [60.0, 60.0]

    def busy() -> None:
        if asked:
            raise HubUnavailableError("busy", asked.pop())

    patience.run(busy)
    assert len(waits) == 4


def test_a_try_that_was_long_under_way_is_done_again(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    now, began = [0.0], []
    monkeypatch.setattr("registry.patience.time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow() -> None:
        began.append(now[0])
        now[0] += 1000.0 if len(began) == 1 else 50.0  # an upload that breaks off, then silence
        raise HubUnavailableError("reset")

    with pytest.raises(HubUnavailableError):
        Patience(sleep=waits.append).run(slow)
    assert began == [0.0, 1000.0, 1050.0]


def test_waits_are_not_in_step(waits: list[float]) -> None:
    random.seed(0)

    def busy() -> None:
        raise HubUnavailableError("busy")

    for _ in range(20):
        with pytest.raises(HubUnavailableError):
            Patience(num_tries=2, sleep=waits.append).run(busy)
    assert len({round(wait, 3) for wait in waits}) > 10


@pytest.mark.parametrize("status", [400, 401, 403, 413])
def test_what_waiting_does_not_mend_is_not_waited_for(
    local: Registry, hub: HubServer, patient: Patience, waits: list[float], status: int
) -> None:
    hub.faults["/commit/"] = status
    with pytest.raises(HubError, match=str(status)) as caught:
        send(local, hub, patience=patient)
    assert not isinstance(caught.value, HubUnavailableError)
    assert waits == []


def test_a_file_that_the_server_finds_too_large(local: Registry, hub: HubServer) -> None:
    hub.largest_bytes = 5000
    with pytest.raises(HubError, match=r"too large .*413.* smaller version"):
        send(local, hub)
    assert set(hub.head(REPO)) == FIRST


# Others who push at the same time


def someone_edits(hub: HubServer, path: str, times: int = 1) -> None:
    """Just before the next commits to main, somebody else's lands there."""
    left = iter(range(times))

    def before(repo: Repo, branch: str) -> None:
        if branch == "main" and next(left, None) is not None:
            content = f"theirs {len(repo.commits)}".encode()
            repo.commit(hub.head(REPO) | {path: StoredFile(content, False)}, "theirs")

    hub.before_commit = before


def test_a_lost_race_is_read_again_and_nothing_of_theirs_is_lost(
    registry: Registry, version: Version, hub: HubServer, patient: Patience, make_folder
) -> None:
    send(registry, hub)
    registry.publish("tiny", registry.add_artifact("checkpoint", make_folder({"config.json": b"{}"})))
    someone_edits(hub, "notes.txt")
    result = send(registry, hub, patience=patient)
    assert result.tag == "v2"
    assert hub.head(REPO)["notes.txt"].content.startswith(b"theirs")
    assert [hub.repos[REPO].titles[c] for c in hub.repos[REPO].history(result.commit)] == [
        "tiny:2 by bitsmith",
        "theirs",
        "tiny:1 by bitsmith",
        "initial commit",
    ]


def test_races_that_are_lost_every_time_end(
    registry: Registry, version: Version, hub: HubServer, patient: Patience, waits: list[float], make_folder
) -> None:
    first = send(registry, hub)
    registry.publish("tiny", registry.add_artifact("checkpoint", make_folder({"config.json": b"{}"})))
    someone_edits(hub, "notes.txt", times=100)
    with pytest.raises(HubRaceError, match="412"):
        send(registry, hub, patience=patient)
    assert len(waits) == patient.num_tries - 1
    assert hub.repos[REPO].tags == {"v1": first.commit}
    assert hub.head(REPO)["config.json"].content != b"{}"


def test_a_race_against_files_that_would_be_loaded_too_is_not_repeated(
    local: Registry, hub: HubServer, patient: Patience
) -> None:
    someone_edits(hub, "model-00002.safetensors")
    with pytest.raises(HubConflictError, match="did not publish"):
        send(local, hub, patience=patient)
    assert set(hub.head(REPO)) == {*FIRST, "model-00002.safetensors"}


def test_a_commit_that_the_client_did_not_make_is_noticed(local: Registry, hub: HubServer) -> None:
    """All our files are there by another's commit: the client sends none, checks no parent, and answers with theirs."""

    class Watching(list[str]):
        """Just before the client asks which files main has, somebody commits what our staging branch has, and more."""

        def append(self, line: str) -> None:
            super().append(line)
            if "/preupload/main" in line:
                repo = hub.repos[REPO]
                staging = next(branch for branch in repo.branches if branch != "main")
                evil = {"evil.safetensors": StoredFile(b"evil", False)}
                repo.commit(repo.commits[repo.branches[staging]] | evil, "the same, and more")

    hub.requests = Watching()
    with pytest.raises(HubRaceError, match=r"evil\.safetensors"):
        send(local, hub)
    assert not hub.sent("/commit/main")
    assert hub.repos[REPO].tags == {}


def test_the_same_version_pushed_by_four_at_once_is_there_once(local: Registry, hub: HubServer) -> None:
    patient = Patience(num_tries=20, first_seconds=0.01)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: send(local, hub, patience=patient), range(4)))
    assert len({result.commit for result in results}) == 1
    assert len(list(hub.repos[REPO].history(results[0].commit))) == 2
    assert set(hub.repos[REPO].branches) == {"main"}


def test_a_file_that_a_gitignore_drops_is_noticed_before_main_moves(
    registry: Registry, version: Version, hub: HubServer, make_folder
) -> None:
    first = send(registry, hub)
    repo = hub.repos[REPO]
    before = repo.commit(hub.head(REPO) | {".gitignore": StoredFile(b"*.json.new\nplan.json\n", False)}, "ignore")
    files = {"config.json": b"{}", "plan.json": b"[]"}
    registry.publish("tiny", registry.add_artifact("checkpoint", make_folder(files)))
    with pytest.raises(IntegrityError, match=r"plan\.json.* main is as it was.*\.gitignore"):
        send(registry, hub)
    assert (repo.branches, repo.tags) == ({"main": before}, {"v1": first.commit})


def test_a_server_without_xet_is_explained(
    local: Registry, hub: HubServer, patient: Patience, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client chooses Xet by itself, and does not go back to plain uploads."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match="HF_HUB_DISABLE_XET=1"):
        send(local, hub, patience=patient)
    assert hub.sent("xet-write-token")
    assert set(hub.head(REPO)) == FIRST
    assert waits == []


def test_once_is_once(waits: list[float]) -> None:
    tries = []

    def busy() -> None:
        tries.append(1)
        raise HubUnavailableError("busy")

    with pytest.raises(HubUnavailableError):
        ONCE.run(busy)
    assert len(tries) == 1


def test_patience_gives_the_result(waits: list[float]) -> None:
    answers = iter([HubRaceError("raced"), None])

    def work() -> Artifact | int:
        if (error := next(answers)) is not None:
            raise error
        return 7

    assert Patience(sleep=waits.append).run(work) == 7
    assert len(waits) == 1
