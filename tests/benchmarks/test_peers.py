"""The peers' harness with made-up peers: no peer needs to be installed."""

import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from benchmarks.peers import job, run
from benchmarks.peers.job import Quantized, Request, forward_error, projections
from benchmarks.peers.result import inputs_digest, load_facts, load_weights, save_weights
from benchmarks.peers.rows import ROWS, Row

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight")


@pytest.fixture
def model(tmp_path) -> Path:
    """A model folder of two projections, a norm and an embedding."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {name: torch.randn(6, 8, dtype=torch.float32).bfloat16() for name in NAMES}
    save_file({**tensors, "model.norm.weight": torch.ones(8)}, folder / "model-1.safetensors")
    save_file({"model.embed_tokens.weight": torch.ones(4, 8)}, folder / "model-2.safetensors")
    return folder


@pytest.fixture
def tokens(tmp_path) -> Path:
    path = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.arange(12).reshape(3, 4)}, path)
    return path


def round_to_halves(request: Request) -> Quantized:
    """A peer that rounds to halves and stores one byte a weight and a float16 a row."""
    answer = Quantized({"grid": 0.5})
    for name, weight in projections(request.model):
        answer.weights[name] = torch.round(2 * weight.float()) / 2
        answer.store("codes", [torch.empty(weight.shape, dtype=torch.int8)])
        answer.store("scales", [torch.empty(len(weight), dtype=torch.float16)])
        answer.check_forward(answer.weights[name], lambda x, name=name: x @ answer.weights[name].T)
    return answer


def call(monkeypatch, quantize, *paths: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["peer", *map(str, paths), "--bits", "8", "--group", "8"])
    job.main("halves", (), quantize)


def test_only_projections_are_quantized(model):
    assert [name for name, _ in projections(model)] == sorted(NAMES)


def test_a_run_writes_weights_and_facts(model, tokens, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    call(monkeypatch, round_to_halves, model, tokens, out)
    weights, facts = load_weights(out)
    for name, original in projections(model):
        assert torch.equal(weights[name], torch.round(2 * original.float()) / 2)
    assert set(weights) == set(NAMES)
    assert facts["stored_bits"] == {"codes": 2 * 6 * 8 * 8, "scales": 2 * 6 * 16}
    assert facts["size_bits"] == sum(facts["stored_bits"].values())
    assert facts["num_params"] == 2 * 6 * 8
    assert (facts["peer"], facts["bits"], facts["group"], facts["rank"]) == ("halves", 8, 8, 0)
    assert facts["settings"] == {"grid": 0.5}
    assert facts["inputs"] == inputs_digest(model, tokens)
    assert facts["seconds"] > 0
    assert facts["cpu_seconds"] > 0
    assert facts["peak_bytes"] > 2**20
    assert facts["forward_error"] < 1e-6
    assert facts["versions"]["torch"] == torch.__version__


def test_the_calibration_tokens_reach_the_peer(model, tokens):
    assert Request(model, tokens, 3, 64, 0).windows().tolist() == torch.arange(12).reshape(3, 4).tolist()


def test_what_a_peer_leaves_lying_about_is_swept_up(model, tokens, tmp_path, monkeypatch):
    def litter(request: Request) -> Quantized:
        Path("peer.log").write_text("hello", encoding="utf-8")
        return round_to_halves(request)

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    call(monkeypatch, litter, model, tokens, Path("out.safetensors"))
    assert [path.name for path in Path.cwd().iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize("fault", ["missing", "transposed", "nan"])
def test_a_wrong_weight_is_refused(fault, model, tokens, tmp_path, monkeypatch):
    def faulty(request: Request) -> Quantized:
        answer = round_to_halves(request)
        if fault == "missing":
            del answer.weights[NAMES[0]]
        elif fault == "transposed":
            answer.weights[NAMES[0]] = answer.weights[NAMES[0]].T
        else:
            answer.weights[NAMES[0]][0, 0] = float("nan")
        return answer

    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=NAMES[0]):
        call(monkeypatch, faulty, model, tokens, out)
    assert not out.exists()


@given(st.lists(st.tuples(st.sampled_from([torch.int32, torch.float16, torch.uint8]), st.integers(0, 9)), max_size=5))
def test_stored_bits_are_bytes_times_eight(shapes):
    answer = Quantized({})
    for dtype, length in shapes:
        answer.store("codes", [torch.zeros(length, 3, dtype=dtype)])
    width = {torch.int32: 32, torch.float16: 16, torch.uint8: 8}
    assert answer.stored_bits.get("codes", 0) == sum(width[dtype] * 3 * length for dtype, length in shapes)


def test_a_checkpoint_is_counted_by_kind(tmp_path):
    """3-bit codes of 64 x 32 in int32 words, their zero points and scales in groups of 32; g_idx and norms are not."""
    module = "model.layers.0.mlp.up_proj"
    (tmp_path / "part").mkdir()
    save_file({f"{module}.qweight": torch.zeros(6, 32, dtype=torch.int32)}, tmp_path / "part" / "a.safetensors")
    rest = {
        f"{module}.qzeros": torch.zeros(2, 3, dtype=torch.int32),
        f"{module}.scales": torch.zeros(2, 32, dtype=torch.float16),
        f"{module}.g_idx": torch.zeros(64, dtype=torch.int32),
        "model.norm.weight": torch.zeros(64),
    }
    save_file(rest, tmp_path / "b.safetensors")
    answer = Quantized({})
    answer.store_checkpoint(tmp_path, leave_out="g_idx")
    assert answer.stored_bits == {"qweight": 3 * 64 * 32, "qzeros": 2 * 3 * 32, "scales": 2 * 32 * 16}


def test_forward_error_sees_a_wrong_weight():
    weight = torch.randn(6, 8)
    assert forward_error(weight, lambda x: x @ weight.T) == 0
    assert forward_error(weight, lambda x: 2 * (x @ weight.T)) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_keep_their_dtype_and_values(dtype, tmp_path):
    weight = torch.randn(5, 7).to(dtype)
    save_weights(tmp_path / "x.safetensors", {"a_proj.weight": weight.T}, {"bits": 3, "settings": {"sym": True}})
    weights, facts = load_weights(tmp_path / "x.safetensors")
    assert weights["a_proj.weight"].dtype == dtype
    assert torch.equal(weights["a_proj.weight"], weight.T)
    assert facts == {"bits": 3, "settings": {"sym": True}} == load_facts(tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_another_safetensors_file_is_refused(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"not a peer's result.*run the peer again"):
        load_weights(tmp_path / "x.safetensors")


def test_the_digest_depends_on_every_input(model, tokens):
    before = inputs_digest(model, tokens)
    assert inputs_digest(model, tokens) == before
    save_file({"tokens": torch.zeros(3, 4, dtype=torch.int64)}, tokens)
    other_tokens = inputs_digest(model, tokens)
    (model / "model-2.safetensors").unlink()
    assert len({before, other_tokens, inputs_digest(model, tokens)}) == 3


@pytest.fixture
def fake_python(tmp_path, monkeypatch):
    """Let every row run a shell script instead of its peer: `$3` is MODEL, `$4` TOKENS, `$5` OUT."""

    def write(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
        monkeypatch.setattr(Row, "python", str(path))

    return write


def outcomes(model: Path, tokens: Path, out: Path, *rows: Row) -> list[run.Outcome]:
    return list(run.run(model, tokens, out, rows))


def finished(model: Path, tokens: Path, path: Path, **facts: object) -> Path:
    save_weights(path, {NAMES[0]: torch.ones(6, 8)}, {"inputs": inputs_digest(model, tokens), **facts})
    return path


def test_a_failing_peer_is_a_row_and_the_next_one_runs(model, tokens, tmp_path, fake_python):
    good = finished(model, tokens, tmp_path / "good.safetensors", peer="hqq")
    fake_python(
        f'case "$2" in *gptq) echo "Traceback (most recent call last):"; echo "torch.cuda.Error: no CUDA, sorry" >&2;'
        f' echo "bye: 3"; exit 1;; *) cp {good} "$5";; esac'
    )
    bad, fine = outcomes(model, tokens, tmp_path / "out", Row("gptq", 3, 64), Row("hqq", 3, 64))
    assert (bad.error, bad.facts, bad.weights) == ("torch.cuda.Error: no CUDA, sorry", None, None)
    assert "Traceback" in (tmp_path / "out" / "gptq-3-g64.log").read_text()
    assert fine.error is None
    assert fine.facts["peer"] == "hqq"
    assert torch.equal(load_weights(fine.weights)[0][NAMES[0]], torch.ones(6, 8))


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("exit 7", "exit code 7 and no exception"),
        ("kill -9 $$", "signal 9"),
        ("exit 0", "exit code 0 and no exception"),  # said to be done, but wrote nothing
        ("echo 'ImportError: No module named hqq'; exit 1", "^ImportError: No module named hqq$"),
    ],
)
def test_every_end_has_a_reason(script, error, model, tokens, tmp_path, fake_python):
    fake_python(script)
    (outcome,) = outcomes(model, tokens, tmp_path / "out", Row("hqq", 3, 64))
    assert outcome.facts is None
    assert re.search(error, outcome.error)


def test_a_missing_environment_says_how_to_make_it(model, tokens, tmp_path):
    (outcome,) = outcomes(model, tokens, tmp_path / "out", Row("gptq", 3, 64, environment="not-there"))
    assert "make peers" in outcome.error


def test_the_peer_gets_its_settings(model, tokens, tmp_path, fake_python):
    fake_python('echo "AskedError: $*"; exit 1')
    (outcome,) = outcomes(model, tokens, tmp_path / "out", Row("loftq", 4, 64, rank=8))
    out = tmp_path / "out" / "loftq-4-g64-r8.safetensors"
    assert outcome.error == (
        f"AskedError: -m benchmarks.peers.loftq {model} {tokens} {out} --bits 4 --group 64 --rank 8"
    )


def test_a_finished_row_runs_again_only_for_other_inputs(model, tokens, tmp_path, fake_python):
    fake_python("echo 'CalledError: again'; exit 1")
    (tmp_path / "out").mkdir()
    finished(model, tokens, tmp_path / "out" / "hqq-3-g64.safetensors")
    (kept,) = outcomes(model, tokens, tmp_path / "out", Row("hqq", 3, 64))
    assert kept.error is None
    save_file({"tokens": torch.zeros(3, 4, dtype=torch.int64)}, tokens)
    (again,) = outcomes(model, tokens, tmp_path / "out", Row("hqq", 3, 64))
    assert again.error == "CalledError: again"


def test_a_stale_result_is_not_taken_for_a_failed_run(model, tokens, tmp_path, fake_python):
    """The peer says it is done but the file is the one of other inputs."""
    (tmp_path / "out").mkdir()
    finished(model, tokens, tmp_path / "out" / "hqq-3-g64.safetensors")
    save_file({"tokens": torch.zeros(3, 4, dtype=torch.int64)}, tokens)
    fake_python("exit 0")
    (outcome,) = outcomes(model, tokens, tmp_path / "out", Row("hqq", 3, 64))
    assert outcome.facts is None


def test_rows_print_as_a_table(capsys):
    facts = {"size_bits": 33, "num_params": 10, "seconds": 2.4, "peak_bytes": 1.5e9, "forward_error": 2e-4}
    run.print_row(run.Outcome(Row("hqq", 3, 64), Path("x"), facts, None))
    run.print_row(run.Outcome(Row("gptq", 3, 64), None, None, "no memory"))
    assert capsys.readouterr().out.splitlines() == [
        "| hqq-3-g64 | 3.300 | 2 | 1.50 | 2.0e-04 |",
        "| gptq-3-g64 | no memory | | | |",
    ]


def test_every_row_has_its_module_and_a_label_of_its_own():
    folder = Path(run.__file__).parent
    assert all((folder / f"{row.peer}.py").exists() for row in ROWS)
    assert len({row.label for row in ROWS}) == len(ROWS)


def test_unknown_peers_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "m", "t", "o", "--only", "awq"])
    with pytest.raises(SystemExit):
        run.main()
    assert "unknown: awq" in capsys.readouterr().err
