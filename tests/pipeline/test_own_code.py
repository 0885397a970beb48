"""Models that bring their own code: run on request alone, and found again by whoever opens the checkpoint."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from pipeline import audit
from pipeline.audit import answer_in_fresh_process  # the real one, which `quick` replaces
from pipeline.card import render_card
from pipeline.cli import app
from pipeline.command import compress_command, evaluate_command
from pipeline.compress import Compressed, compress
from pipeline.errors import CheckpointError, ModelError, RecipeError
from pipeline.model import open_model
from pipeline.own_code import code_files, referring_to
from pipeline.packed import load_packed
from pipeline.recipe import Recipe
from pipeline.version_facts import VersionFacts
from registry import Registry
from registry.publication import refuse_executables
from tests.models import build_llama, save_model
from tests.pipeline.small import SMALL, TEXTS
from tests.pipeline.test_model import pretend_hub

CODE = Path(__file__).parent / "own_code"
COMMIT = "c0ffee" * 6 + "c0ff"
AUTO_MAP = {
    "AutoConfig": "configuration_drum.DrumConfig",
    "AutoModelForCausalLM": "modeling_drum.DrumForCausalLM",
}


@pytest.fixture(scope="module", autouse=True)
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers keeps a copy of the code that it runs; not in the user's folder."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", folder)
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        yield


@pytest.fixture(scope="module")
def drum(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """A folder with weights and code, and a marker that the code leaves when it runs."""
    folder = tmp_path_factory.mktemp("drum")
    for path in CODE.glob("*.py"):
        shutil.copy(path, folder)
    with (folder / "configuration_drum.py").open("a") as file:
        file.write(f"\n\nopen({str(folder / 'ran')!r}, 'w').close()\n")
    save_config(folder)
    tiny_tokenizer.save_pretrained(folder)
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_config(folder: Path, **changes: Any) -> None:
    config = {"model_type": "drum", "architectures": ["DrumForCausalLM"], "auto_map": AUTO_MAP, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config | changes))


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (384, 64), "lm_head.weight": (384, 64), "norm.weight": (64,), "norm.bias": (64,)}
    for layer in ("layers.0", "layers.1"):
        shapes |= {f"{layer}.norm.weight": (64,), f"{layer}.norm.bias": (64,)}
        shapes |= {f"{layer}.mix_proj.weight": (64, 64), f"{layer}.up_proj.weight": (128, 64)}
        shapes |= {f"{layer}.down_proj.weight": (64, 128)}
    return {
        name: torch.ones(shape) if name.endswith("norm.weight") else 0.3 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def recipe_of(model: Path | str, **settings: Any) -> Recipe:
    return Recipe.of("fast", **(SMALL | {"model": str(model), "trust_remote_code": True} | settings))


@pytest.fixture(scope="module")
def compressed(drum: Path, tmp_path_factory: pytest.TempPathFactory, quick) -> Compressed:
    root = tmp_path_factory.mktemp("compressed")
    return compress(recipe_of(drum), Registry(root / "registry"), root / "out")


def test_it_is_refused_and_not_run_without_consent(drum: Path) -> None:
    """In a process of its own: code that this one has loaded before would not run a second time."""
    (drum / "ran").unlink(missing_ok=True)
    for trusted, code in ((False, 1), (True, 0)):
        command = [sys.executable, "-m", "pipeline", "inspect", str(drum), *["--trust-remote-code"] * trusted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert ("--trust-remote-code" in done.stderr) == (not trusted)
        assert (drum / "ran").exists() == trusted


def test_with_consent_its_layers_are_found(drum: Path) -> None:
    model = open_model(str(drum), trust_remote_code=True)
    assert [matrix.kind for matrix in model.matrices] == ["mix_proj", "up_proj", "down_proj"] * 2
    result = CliRunner().invoke(app, ["inspect", str(drum), "--trust-remote-code", "--json"])
    assert len(json.loads(result.output)["matrices"]) == 6


def test_code_is_part_of_what_the_model_is(drum: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(drum, tmp_path / "changed"))
    with (changed / "modeling_drum.py").open("a") as file:
        file.write("# a word\n")
    digests = [open_model(str(folder), trust_remote_code=True).digest for folder in (drum, changed)]
    assert digests[0] != digests[1]


def test_a_fresh_process_opens_the_checkpoint_with_transformers_alone(compressed: Compressed) -> None:
    """The code is in the folder, for nobody else could refer to a local one."""
    assert (compressed.folder / "modeling_drum.py").read_bytes() == (CODE / "modeling_drum.py").read_bytes()
    script = (
        "import quantizers, sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)\n"
        "torch.save(model(torch.arange(20)[None]).logits, sys.argv[2])\n"
    )
    answer = compressed.folder.parent / "answer"
    subprocess.run([sys.executable, "-c", script, str(compressed.folder), str(answer)], check=True)
    packed = load_packed(compressed.folder, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(answer), packed(torch.arange(20)[None]).logits)
    assert set(json.loads((compressed.folder / "plan.json").read_text())["matrices"]) == {
        f"layers.{layer}.{kind}" for layer in range(2) for kind in ("mix_proj", "up_proj", "down_proj")
    }


def test_the_audits_process_runs_it_with_consent(compressed: Compressed) -> None:
    expected = audit.fixed_answer(load_packed(compressed.folder, trust_remote_code=True))
    torch.testing.assert_close(answer_in_fresh_process(compressed.folder, trust_remote_code=True), expected)
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        answer_in_fresh_process(compressed.folder)


def test_commands_on_the_checkpoint_want_consent_too(drum: Path, compressed: Compressed) -> None:
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        load_packed(compressed.folder)
    folder, trust = str(compressed.folder), "--trust-remote-code"
    result = CliRunner().invoke(app, ["generate", folder, "Once upon", "--max-new-tokens", "2", trust])
    assert result.exit_code == 0, result.output
    windows = ["--num-windows", "2", "--seq-len", "32", *TEXTS[2:]]
    windows[windows.index("--eval-dataset")] = "--dataset"
    result = CliRunner().invoke(app, ["evaluate", folder, "--base", str(drum), *windows, "--json", "--quiet", trust])
    assert compressed.evaluation is not None
    assert json.loads(result.stdout)["kl_divergence"] == compressed.evaluation.to_json()["kl_divergence"]


def test_an_adapter_is_trained_on_it(compressed: Compressed, tmp_path: Path) -> None:
    """And is not merged, for the dense model would need the code too."""
    arguments = ["finetune", str(compressed.folder), "--steps", "1", "--seq-len", "64", "-o", str(tmp_path / "adapter")]
    arguments += ["--trust-remote-code", "--quiet"]
    refused = CliRunner().invoke(app, [*arguments, "--merged", str(tmp_path / "merged")])
    assert isinstance(refused.exception, RecipeError)
    assert "--merged" in str(refused.exception)
    assert CliRunner().invoke(app, arguments).exit_code == 0
    prompt = ["Once", "--max-new-tokens", "2", "--adapter", str(tmp_path / "adapter"), "--trust-remote-code"]
    assert CliRunner().invoke(app, ["generate", str(compressed.folder), *prompt]).exit_code == 0


def test_of_the_hub_the_commit_is_referred_to(
    drum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick
) -> None:
    """Its code is downloaded with it, and stays out of the checkpoint; whoever opens that gets it from the commit."""
    snapshot = Path(shutil.copytree(drum, tmp_path / "snapshots" / COMMIT))
    asked = pretend_hub(monkeypatch, snapshot, ["model.safetensors"], sha=COMMIT)
    served: list[tuple[str, str]] = []

    def cached_file(repo_id: str, name: str, **options: Any) -> str:
        if str(repo_id) != "user/name":
            return str(Path(repo_id) / name)
        assert options["local_files_only"]
        assert any(each["revision"] == options["revision"] for each in asked), "nobody downloaded it"
        served.append((name, options["revision"]))
        return str(snapshot / name)

    monkeypatch.setattr("transformers.dynamic_module_utils.cached_file", cached_file)
    registry = Registry(tmp_path / "registry")
    done = compress(recipe_of("user/name", revision="main"), registry, tmp_path / "out")
    assert "*.py" in asked[0]["allow_patterns"]
    assert not list(done.folder.rglob("*.py"))
    refuse_executables(registry.get(done.version.digest).files)
    config = json.loads((done.folder / "config.json").read_text())
    assert config["auto_map"] == {auto: f"user/name--{reference}" for auto, reference in AUTO_MAP.items()}
    asked.clear()
    load_packed(done.folder, trust_remote_code=True)
    assert asked[0] == {"repo_id": "user/name", "revision": COMMIT, "allow_patterns": "*.py"}
    assert set(served) == {("modeling_drum.py", COMMIT), ("configuration_drum.py", COMMIT)}
    card = render_card(VersionFacts.of(registry, done.version), "me/mine", "v1")
    assert card.count(f'trust_remote_code=True, code_revision="{COMMIT}"') == 2
    assert "trust_remote_code=True" in (done.folder / "report" / "index.html").read_text()


def test_a_tokenizers_code_is_referred_to_like_the_models() -> None:
    named = {"AutoTokenizer": ["tokenization_drum.DrumTokenizer", None], "AutoModel": "other/repo--modeling.Model"}
    assert referring_to("user/name", {"auto_map": named, "bos_token": "<s>"}) == {
        "auto_map": {
            "AutoTokenizer": ["user/name--tokenization_drum.DrumTokenizer", None],
            "AutoModel": "other/repo--modeling.Model",
        },
        "bos_token": "<s>",
    }
    assert referring_to("user/name", {"auto_map": ["a.B", None]}) == {"auto_map": ["user/name--a.B", None]}
    assert referring_to(None, {"auto_map": named}) == {"auto_map": named}


def test_only_what_is_named_is_code(drum: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = Path(shutil.copytree(drum, tmp_path / "model"))
    for stray in ("train.py", ".venv/lib/site.py"):
        (folder / stray).parent.mkdir(parents=True, exist_ok=True)
        (folder / stray).touch()
    assert code_files(folder) == ["configuration_drum.py", "modeling_drum.py"]
    assert code_files(tiny_model_dir) == []
    model = open_model(str(tiny_model_dir), trust_remote_code=True)
    assert not model.trust_remote_code, "there is nothing to trust"
    assert model.digest == open_model(str(tiny_model_dir)).digest


def test_code_of_another_repository_is_refused(drum: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(drum, tmp_path / "model"))
    save_config(folder, auto_map={"AutoConfig": "some/body--configuration.Config"})
    with pytest.raises(ModelError, match=r"another repository \(some/body\)"):
        open_model(str(folder), trust_remote_code=True)


def test_the_class_is_that_of_the_named_architecture_or_any_that_there_is(drum: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(drum, tmp_path / "model"))
    for named in (["DrumForCausalLM"], ["SomethingElse"], None):
        save_config(folder, architectures=named, auto_map=AUTO_MAP | {"AutoModel": "modeling_drum.DrumModel"})
        assert type(open_model(str(folder), trust_remote_code=True).load()).__name__ == "DrumForCausalLM"


def test_what_transformers_has_itself_needs_no_code(tmp_path: Path, tiny_tokenizer, quick) -> None:
    """Repositories of known architectures still name the code that they once needed."""
    folder = save_model(build_llama(), tmp_path / "model", tokenizer=tiny_tokenizer)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    done = compress(recipe_of(folder, trust_remote_code=False), Registry(tmp_path / "registry"), tmp_path / "out")
    assert not (folder / "ran").exists()
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((done.folder / name).read_text())
    assert type(load_packed(done.folder)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("file", ["configuration_drum.py", "modeling_drum.py"])
def test_code_that_fails_is_named(file: str, drum: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(drum, tmp_path / "broken"))
    (folder / file).write_text("raise ArithmeticError('made for another machine')\n")
    with pytest.raises(ModelError, match="made for another machine") as caught:
        open_model(str(folder), trust_remote_code=True)
    assert "\n" not in str(caught.value)


def test_code_that_is_missing_is_told_from_code_that_is_not_trusted(drum: Path, tmp_path: Path) -> None:
    """As in a cache that was filled without the flag, and is read with it offline."""
    folder = Path(shutil.copytree(drum, tmp_path / "model", ignore=shutil.ignore_patterns("*.py")))
    with pytest.raises(ModelError, match=r"is missing.*Download the model again") as caught:
        open_model(str(folder), trust_remote_code=True)
    assert "--trust-remote-code" not in str(caught.value)


def test_commands_that_repeat_the_work_have_the_flag(drum: Path) -> None:
    recipe = recipe_of(drum).to_json()
    assert "--trust-remote-code" in compress_command(recipe).split()
    assert "--trust-remote-code" in evaluate_command(recipe).split()
    assert "trust" not in compress_command(recipe | {"trust_remote_code": False})
