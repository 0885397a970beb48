"""`bitsmith registry`: what is shown, compared, promoted and removed, and what is refused."""

import json
import shutil
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.compress import compress
from pipeline.errors import GateError
from pipeline.gate import Requirement, check
from pipeline.recipe import Recipe
from registry import Registry
from tests.keys import write_keys
from tests.pipeline.conftest import Answer
from tests.pipeline.small import SMALL
from tests.registry.hub_server import WRITE_TOKEN, HubServer
from tests.registry.sigstore_server import SigstoreServer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, quick: None) -> Path:
    """A home with tiny:1 of 4.5 bits and tiny:2 of 3."""
    home = tmp_path_factory.mktemp("home")
    for budget in ("4.5bpw", "3bpw"):
        recipe = Recipe.of(model=str(tiny_model_dir), **(SMALL | {"budget": budget}))
        compress(recipe, Registry(home / "registry"), home / budget, name="tiny")
    return home


@pytest.fixture
def call(made: Path, tmp_path: Path, monkeypatch, bitsmith):
    """call("list") runs `bitsmith registry list` on a copy of `made`."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BITSMITH_ACTOR", "nightly")
    return lambda *arguments: bitsmith("registry", *arguments)


def facts(answer: Answer):
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


def test_list_and_show(call) -> None:
    listed = call("list").out
    assert "tiny:1" in listed
    assert "tiny:2" in listed
    shown = call("show", "tiny")
    assert "model.safetensors" in shown.out
    assert "3bpw" in shown.out
    assert facts(call("show", "tiny:1", "--json"))["version"] == 1
    assert [version["version"] for version in facts(call("list", "--json"))] == [1, 2]
    unknown = call("show", "nosuch")
    assert unknown.code == 1
    assert "registry list" in unknown.err


def test_a_version_whose_description_is_lost_is_listed_as_damaged(call, tmp_path: Path) -> None:
    root = tmp_path / "home" / "registry"
    digest = facts(call("show", "tiny:1", "--json"))["digest"]
    for path in root.glob("index.sqlite*"):
        path.unlink()
    (root / "records" / "artifacts" / digest[:2] / f"{digest}.json").write_text("{")
    assert "doctor --repair" in call("list").err
    found = call("doctor", "--json")
    assert found.code == 1
    assert {finding["what"] for finding in json.loads(found.out)} == {
        "the index",
        f"the record of artifact {digest[:12]}",
    }
    mended = call("doctor", "--repair")
    assert mended.code == 1
    assert "1 of 3 damages are left: tiny:1" in " ".join(mended.err.split())
    listed = call("list").out
    assert "damaged" in next(line for line in listed.splitlines() if "tiny:1" in line)
    assert "damaged" not in next(line for line in listed.splitlines() if "tiny:2" in line)
    refused = call("show", "tiny:1")
    assert refused.code == 1
    assert "registry doctor" in " ".join(refused.err.split())
    assert call("verify", "tiny:2").code == 0


def test_lineage_goes_down_to_the_base_model(call, tiny_model_dir: Path) -> None:
    shown = call("lineage", "tiny").out
    for kind in ("checkpoint", "plan", "costs", "statistics", "matrices"):
        assert kind in shown
    assert "see above" in shown
    assert "base model" in shown
    found = facts(call("lineage", "tiny:1", "--json"))
    assert found["artifacts"][0]["digest"] == found["digest"]
    assert found["artifacts"][0]["metadata"]["settings"]["model"] == tiny_model_dir.name
    assert found["missing"] == []
    for artifact in found["artifacts"]:
        assert artifact["metadata"]["tools"].keys() == {"python", "torch", "transformers"}


def test_lineage_names_what_is_not_here(call, tmp_path: Path) -> None:
    store = Registry(tmp_path / "home" / "registry")
    checkpoint = store.get(store.version("tiny:1").digest)
    other = Registry(tmp_path / "other" / "registry")
    for entry in checkpoint.files.values():
        other.store.add(store.store.path(entry.sha256))
    other.record(checkpoint)
    other.publish("tiny", checkpoint)
    shutil.rmtree(tmp_path / "home")
    shutil.move(tmp_path / "other", tmp_path / "home")
    assert "not in this registry" in call("lineage", "tiny").out
    assert len(facts(call("lineage", "tiny", "--json"))["missing"]) == len(checkpoint.parents)


def test_diff_tells_recipe_choices_and_figures(call) -> None:
    found = facts(call("diff", "tiny:1", "tiny@latest", "--json"))
    assert (found["before"], found["after"]) == ("tiny:1", "tiny:2")
    assert found["recipe"] == {"budget": ["4.5bpw", "3bpw"]}
    before, after = found["figures"]["bits_per_param"]
    assert before > 3 >= after
    assert found["figures"]["kld"][1] > found["figures"]["kld"][0] > 0
    assert found["choices"]
    assert all(old != new for old, new in found["choices"].values())
    assert found["shared"]["files"] > 0, "the tokenizer is the same"
    shown = call("diff", "tiny:1", "tiny:2").out
    assert "KL divergence" in shown
    assert "4.5bpw" in shown
    assert "stored once" in shown
    same = call("diff", "tiny:1", "tiny:1")
    assert "The same in both: recipe and plan." in same.out


def test_aliases_are_set_shown_and_removed(call) -> None:
    assert "has no aliases" in call("alias", "tiny").out
    assert "tiny@production names version 1 (before: nothing)" in call("alias", "tiny:1", "production").out
    assert facts(call("alias", "tiny:2", "production", "--reason", "smaller", "--json"))["from_version"] == 1
    assert "production" in call("list").out
    assert facts(call("show", "tiny@production", "--json"))["version"] == 2
    shown = call("alias", "tiny").out
    for word in ("tiny:2", "smaller", "nightly"):
        assert word in shown
    assert call("alias", "tiny", "production", "--remove").code == 0
    log = facts(call("alias", "tiny", "--json"))
    assert log["aliases"] == {}
    assert [(move["action"], move["moved_by"]) for move in log["log"]] == [
        ("set", "nightly"),
        ("set", "nightly"),
        ("remove", "nightly"),
    ]
    assert "cannot be moved" in call("alias", "tiny:1", "latest").err
    assert call("alias", "tiny", "--remove").code == 1


def test_promotion_takes_what_meets_the_gate_and_refuses_with_the_figures(call) -> None:
    gate = ["--require", "bits_per_param<=3", "--require", "kld<=5"]
    refused = call("promote", "tiny:1", "production", *gate)
    assert refused.code == 1
    assert "bits_per_param is 4.4" in " ".join(refused.err.split())
    assert "wanted <=3 (not met)" in refused.err
    assert "kld is" in refused.err
    assert "(met)" in refused.err
    assert "no alias" in call("show", "tiny@production").err
    assert "names version 2" in call("promote", "tiny:2", "production", *gate, "--reason", "nightly run").out
    (move,) = facts(call("alias", "tiny", "--json"))["log"]
    assert (move["action"], move["reason"]) == ("promote", "nightly run (bits_per_param<=3 kld<=5)")


def test_an_index_that_does_not_answer_claims_no_store(bitsmith, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path / "home"))
    (tmp_path / "store").mkdir()
    store = f"file://{tmp_path / 'store'}"
    failed = bitsmith("registry", "init", "--database", "postgresql://ann@127.0.0.1:9/typo", "--store", store)
    assert failed.code == 1
    assert bitsmith("registry", "init", "--store", store).code == 0


def test_a_gate_says_its_figures_to_the_last_digit(call) -> None:
    size = Requirement.parse("size_bytes<=123456789")
    assert str(size) == "size_bytes<=123456789"
    with pytest.raises(GateError, match=r"size_bytes is 123456790, wanted <=123456789 \(not met\)"):
        check("tiny:1", {"size_bytes": 123456790.0}, [size])


@pytest.mark.parametrize("gate", ["kld", "kld<=x", "kld==1", "speed>=1", "kld<=nan", ""])
def test_malformed_gates_are_refused(gate: str, call) -> None:
    refused = call("promote", "tiny", "production", "--require", gate)
    assert refused.code == 1
    assert "is not a requirement" in refused.err


def test_a_version_without_a_measurement_meets_no_gate_of_quality(call, tmp_path: Path) -> None:
    store = Registry(tmp_path / "home" / "registry")
    store.publish("pulled", store.get(store.version("tiny:1").digest))
    refused = call("promote", "pulled", "production", "--require", "kld<=1e9")
    assert refused.code == 1
    assert "kld was not measured" in refused.err
    assert call("promote", "pulled", "production", "--require", "size_bytes<=200e6").code == 0
    assert facts(call("diff", "tiny:1", "pulled", "--json"))["figures"]["kld"][1] is None


def test_rollback(call) -> None:
    for number in (1, 2):
        assert call("alias", f"tiny:{number}", "production").code == 0
    assert "names version 1 (before: version 2)" in call("rollback", "tiny", "production", "--reason", "slow").out
    again = call("rollback", "tiny", "production")
    assert again.code == 1
    assert "nothing to go back to" in again.err


def test_gc_keeps_the_versions_and_their_lineage(call, tmp_path: Path) -> None:
    time.sleep(1.1)  # the index counts in seconds
    orphan = tmp_path / "orphan"
    orphan.mkdir()
    (orphan / "file").write_bytes(b"1234")
    digest = Registry(tmp_path / "home" / "registry").add_artifact("statistics", orphan).digest
    assert facts(call("gc", "--json"))["artifacts"] == [], "within the grace"
    time.sleep(1.1)
    promised = facts(call("gc", "--grace", "0s", "--dry-run", "--json"))
    found = facts(call("gc", "--grace", "0s", "--json"))
    assert promised == found | {"dry_run": True}
    assert found["artifacts"] == [{"kind": "statistics", "digest": digest}]
    assert found["size_bytes"] == 4
    assert "0 results, 0 files" in call("gc", "--grace", "0s").out
    assert call("verify", "tiny:1", "-q").code == 0
    assert facts(call("lineage", "tiny:1", "--json"))["missing"] == []


@pytest.mark.parametrize("grace", ["", "14", "d", "-1d", "1w"])
def test_malformed_times_are_refused(grace: str, call) -> None:
    refused = call("gc", f"--grace={grace}")
    assert refused.code == 1
    assert "is not a time" in refused.err


def test_verify_finds_a_flipped_byte(call, tmp_path: Path) -> None:
    assert "all sound" in call("verify", "tiny:1").out
    assert facts(call("verify", "tiny:1", "--json"))["ok"]
    store = Registry(tmp_path / "home" / "registry")
    blob = store.path(store.get(store.version("tiny:1").digest), "model.safetensors")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    damaged = call("verify", "tiny:1")
    assert damaged.code == 1
    assert "model.safetensors" in damaged.err


def test_init_refuses_a_second_index(call) -> None:
    assert "2 versions" in call("init").out
    refused = call("init", "--database", "postgresql://host/name")
    assert refused.code == 1
    assert "has its index already" in refused.err


def test_init_makes_a_registry_with_either_database(bitsmith, database, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path / "home"))
    options = [] if database is None else ["--database", database]
    for _ in range(2):
        made = bitsmith("registry", "init", *options)
        assert made.code == 0, made.err
        assert "0 versions" in made.out
    assert (tmp_path / "home" / "registry" / "index.sqlite").exists() == (database is None)
    if database is not None:
        assert "as " in bitsmith("registry", "init").err


def test_init_leaves_nothing_behind_where_the_server_does_not_answer(bitsmith, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path / "home"))
    refused = bitsmith("registry", "init", "--database", "postgresql://ann:secret@127.0.0.1:1/models")
    assert refused.code == 1
    assert "secret" not in refused.err
    assert bitsmith("registry", "init").code == 0


def test_init_makes_a_registry_with_its_files_at_a_url(bitsmith, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path / "home"))
    url = f"file://{tmp_path}/mounted/models"
    for _ in range(2):
        made = bitsmith("registry", "init", "--store", url)
        assert made.code == 0, made.err
        assert f"its files are at {url}" in made.out
    (tmp_path / "file").write_text("content")
    entry = Registry(tmp_path / "home" / "registry").store.add(tmp_path / "file")
    assert (tmp_path / "mounted" / "models" / "sha256" / entry.sha256[:2] / entry.sha256).read_text() == "content"
    assert "has its index already" in bitsmith("registry", "init").err
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path / "other"))
    assert "belongs to another registry" in bitsmith("registry", "init", "--store", url).err


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/models", "file:///dev/null/models", "nosuch://models"])
def test_init_leaves_nothing_behind_where_the_store_cannot_be_written(
    url: str, bitsmith, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path / "home"))
    refused = bitsmith("registry", "init", "--store", url)
    assert refused.code == 1
    assert "secret" not in refused.err
    assert not (tmp_path / "home" / "registry").exists()
    assert bitsmith("registry", "init").code == 0


def test_doctor_names_damage_and_mends_what_it_can(call, tmp_path: Path) -> None:
    assert "The registry is sound." in call("doctor").out
    root = tmp_path / "home" / "registry"
    for path in root.glob("index.sqlite*"):
        path.unlink()
    lost = call("list")
    assert lost.code == 1
    assert "doctor --repair" in lost.err
    found = call("doctor")
    assert found.code == 1
    assert "1 of 1 damages are left: the index" in found.err
    assert "Repaired." in call("doctor", "--repair").out
    assert "tiny:2" in call("list").out
    store = Registry(root)
    store.path(store.get(store.version("tiny:1").digest), "model.safetensors").unlink()
    answer = call("doctor", "--repair", "--json")
    assert answer.code == 1
    (finding,) = json.loads(answer.out)
    assert finding["problem"] == "is missing"
    assert "tiny:1" in finding["advice"]
    assert not finding["is_repaired"]


def test_export_and_import(call, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "tiny.tar"
    assert "tiny:2" in call("export", "tiny", file).out
    assert call("export", "tiny", file).code == 1
    assert facts(call("import", file, "--name", "copy", "--json"))["version"] == 1
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path / "elsewhere"))
    assert "tiny:1" in call("import", file).out
    assert "all sound" in call("verify", "tiny").out
    assert "3bpw" in call("show", "tiny").out
    assert "statistics" in call("lineage", "tiny").out
    assert "The registry is sound." in call("doctor").out
    (tmp_path / "cut.tar").write_bytes(file.read_bytes()[:5000])
    cut = call("import", tmp_path / "cut.tar", "--name", "cut")
    assert cut.code == 1
    assert "Nothing was published" in cut.err


def test_sign_and_verify_with_a_key(call, tmp_path: Path, monkeypatch) -> None:
    private, public = write_keys(tmp_path, "key", ec.SECP256R1(), b"word")
    _, foreign = write_keys(tmp_path, "foreign", ec.SECP256R1())
    assert "it has none" in call("verify", "tiny", "--public-key", public).err
    assert call("sign", "tiny", "--key", private, "--password-variable", "NO_SUCH").code == 1
    monkeypatch.setenv("KEY_PASSWORD", "word")
    signed = call("sign", "tiny", "--key", private, "--password-variable", "KEY_PASSWORD")
    assert "tiny:2 is signed" in signed.out, signed.err
    verified = call("verify", "tiny", "--public-key", public)
    assert "14 matrices as planned, signed with the key" in verified.out
    refused = call("verify", "tiny", "--public-key", foreign)
    assert refused.code == 1
    assert "none holds" in refused.err
    assert call("verify", "tiny:1", "--public-key", public).code == 1
    assert call("verify", "tiny:1", "--public-key", public, "--json").out == "", "nothing says ok"


def test_sign_and_verify_without_a_key(call, bitsmith, tmp_path: Path, monkeypatch) -> None:
    """On to the Hub and back, by what the command line offers."""
    _, public = write_keys(tmp_path, "key", ec.SECP256R1())
    with SigstoreServer() as sigstore, HubServer() as hub:
        trust = ("--trust-config", sigstore.write_trust_config(tmp_path / "trust.json"))
        alice = ("--identity", "alice@example.com", "--issuer", sigstore.issuer, *trust)
        keyless = ("--identity-token-variable", "TOKEN", *trust)
        monkeypatch.setenv("TOKEN", f"{sigstore.token()}\n")
        signed = call("sign", "tiny", "--keyless", *keyless)
        assert "tiny:2 is signed" in signed.out, signed.err
        verified = call("verify", "tiny", *alice)
        assert f"14 matrices as planned, signed by alice@example.com (by {sigstore.issuer})" in verified.out
        refused = call("verify", "tiny", "--identity", "bob@example.com", *alice[2:])
        assert (refused.code, refused.out) == (1, "")
        assert "none holds" in refused.err

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        pushed = bitsmith("push", "tiny", "alice/alone")
        assert "not the card, the report and the lineage. Push with --sign-key" in pushed.out, pushed.err
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("BITSMITH_HOME", str(tmp_path / "elsewhere"))
            pulled = bitsmith("pull", "alice/alone", *alice)
            assert "Report and lineage are not taken over: the signature does not cover them." in pulled.out
        pushed = bitsmith("push", "tiny", "alice/tiny", "--sign-keyless", *keyless)
        assert "not the card" not in pushed.out
        assert ", signed)" in " ".join(pushed.out.split()), pushed.err
        pulled = bitsmith("pull", "alice/tiny@v2", *alice)
        assert f"signature of alice@example.com (by {sigstore.issuer}) holds" in pulled.out, pulled.err
        assert bitsmith("pull", "alice/tiny@v2", "--offline", *alice).code == 0
        assert "not checked" in bitsmith("pull", "alice/tiny@v2").out
        for other in (("--public-key", public), ("--identity", "bob@example.com", *alice[2:])):
            refused = bitsmith("pull", "alice/tiny@v2", *other)
            assert (refused.code, refused.out) == (1, "")
            assert "none holds" in refused.err


def test_a_key_and_an_identity_exclude_each_other(call, bitsmith, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TOKEN", "")
    push, pull = ("push", "tiny", "alice/tiny"), ("pull", "alice/tiny")
    sign, verify = ("registry", "sign", "tiny"), ("registry", "verify", "tiny")
    for arguments, word in (
        (sign, "Who signs?"),
        ((*sign, "--key", "k", "--keyless"), "one of the two"),
        ((*push, "--sign-key", "k", "--sign-keyless"), "--sign-key signs with a key and --sign-keyless without"),
        ((*sign, "--key", "k", "--trust-config", "t"), "--trust-config belongs to --keyless"),
        ((*sign, "--keyless", "--password-variable", "P"), "--password-variable belongs to --key"),
        ((*push, "--identity-token-variable", "TOKEN"), "--identity-token-variable belongs to --sign-keyless"),
        ((*sign, "--keyless", "--identity-token-variable", "NO_SUCH"), "The environment has no NO_SUCH"),
        ((*sign, "--keyless", "--identity-token-variable", "TOKEN"), "no JWT"),
        ((*verify, "--public-key", "k", "--identity", "a", "--issuer", "b"), "one of the two"),
        ((*verify, "--identity", "a"), "--identity needs --issuer too"),
        ((*pull, "--issuer", "b"), "--issuer needs --identity too"),
        ((*pull, "--identity", "", "--issuer", "b"), "The identity is empty"),
        ((*pull, "--public-key", "k", "--trust-config", "t"), "--trust-config belongs to --identity"),
        ((*pull, "--offline", "--identity", "a", "--issuer", "b"), "--offline asks nobody"),
    ):
        refused = bitsmith(*arguments)
        assert refused.code == 1, arguments
        assert word in " ".join(refused.err.split()), arguments


@pytest.fixture
def stranger(call, tmp_path: Path):
    """stranger("plan.json", "{") publishes tiny:1 with that file changed, or without it, as `strange`."""

    def make(name: str, content: str | None, kind: str = "checkpoint") -> None:
        registry = Registry(tmp_path / "home" / "registry")
        folder = tmp_path / "strange"
        registry.materialize(registry.get(registry.version("tiny:1").digest), folder)
        (folder / name).unlink() if content is None else (folder / name).write_text(content)
        registry.publish("strange", registry.add_artifact(kind, folder, [], {"settings": "none", "tools": [1]}))

    return make


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"bits_per_param": 3, "budget": "3bpw", "matrices": {"a": 1}}'])
@pytest.mark.parametrize("name", ["plan.json", "recipe.json"])
def test_a_malformed_document_is_named_in_one_paragraph(name: str, content: str, call, stranger, bitsmith) -> None:
    stranger(name, content)
    commands = [("registry", "diff", "strange", "tiny"), ("push", "strange", "alice/strange")]
    if name == "plan.json":
        commands += [("registry", "verify", "strange")]
        commands += [("registry", "promote", "strange", "production", "--require", "bits_per_param<=9")]
    for command in commands:
        answer = bitsmith(*command)
        assert answer.code == 1
        assert f"{name} of strange:1 is not as bitsmith writes it" in answer.err
        assert answer.err.count("\n") == 1
    assert call("show", "strange").code == 0
    assert call("lineage", "strange").code == 0


@pytest.mark.parametrize("name", ["plan.json", "recipe.json"])
def test_a_version_without_plan_or_recipe_passes_the_gates_that_need_none(name: str, call, stranger, bitsmith) -> None:
    stranger(name, None)
    for command in (("registry", "diff", "strange", "tiny"), ("push", "strange", "alice/strange")):
        answer = bitsmith(*command)
        assert answer.code == 1
        assert f"strange:1 has no {name}" in answer.err
    if name == "plan.json":
        refused = call("promote", "strange", "production", "--require", "bits_per_param<=9")
        assert refused.code == 1
        assert "was not measured" in refused.err
        unsound = call("verify", "strange")
        assert unsound.code == 1
        assert "every hash holds, but there is no plan.json" in unsound.err
    assert call("promote", "strange", "production", "--require", "size_bytes<=1e9").code == 0


def test_a_version_that_is_no_checkpoint_needs_no_plan(call, stranger) -> None:
    stranger("plan.json", None, kind="dataset")
    verified = call("verify", "strange")
    assert verified.code == 0
    assert "all sound, and so are 1 records of what it was made from; no plan to compare with" in verified.out


def test_list_asks_as_often_for_many_versions_as_for_few(call, tmp_path: Path, monkeypatch) -> None:
    from registry.database import Database

    asked, reading = [], Database.reading

    def counted(database):
        asked.append(1)
        return reading(database)

    monkeypatch.setattr(Database, "reading", counted)
    assert call("list").code == 0
    few, registry = len(asked), Registry(tmp_path / "home" / "registry")
    artifact = registry.get(registry.version("tiny:1").digest)
    for number in range(6):
        registry.publish(f"name{number}", artifact)
        registry.alias(f"name{number}", "tested")
    asked.clear()
    listed = call("list")
    assert len(asked) == few
    assert listed.out.count("tested") == 6


def test_gc_without_a_grace_names_none(call) -> None:
    assert "that versions need and that running processes use." in call("gc", "--grace", "0s").out
    assert "and what was used within 14 days." in call("gc").out
