"""Compiled loops give torch's numbers: bit for bit where they decode, but for the order of sums where they multiply."""

import builtins
import warnings
from typing import Any

import pytest
import torch

from quantizers import QuantizedTensor, compiled, quantizer_from_label
from quantizers.embedding import QuantizedHead
from quantizers.rotated_format import AbstractRotatedFormat
from quantizers.trellis import _Viterbi, encode

BLOCKS = [
    *("lloyd2-g32-s4", "lloyd3-g64-s5", "lloyd4-g128-s6", "lloyd5-g16-s7", "lloyd6-g64-s8"),
    "nf8-g64-s3",
]
SEARCHES = [
    (1, 6, 40),
    (2, 8, 256),
    (3, 6, 2),
    (3, 10, 30),
    (4, 8, 17),
    (5, 9, 64),
    (1, 12, 256),
    (3, 12, 256),
    (5, 12, 256),
]
TILES = ["trellis1", "trellis2-l12", "trellis3", "trellis4-l10", "trellis5", "vtrellis2.75"]


@pytest.fixture(autouse=True)
def _for_all_sizes(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(compiled, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(compiled, "LEAST_COSTS", 1)
    monkeypatch.setattr(compiled, "WEIGHTS_A_THREAD", 1)


def quantized(label: str, shape: tuple[int, int]) -> QuantizedTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return quantizer_from_label(label).quantize(weight)


def by_torch(monkeypatch, run: Any) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_loops", lambda: None)
        return run()


@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (130, 160)], ids=str)
@pytest.mark.parametrize("label", BLOCKS)
def test_few_rows_times_blocks(label: str, shape: tuple[int, int], monkeypatch) -> None:
    weight = quantized(label, shape)
    for num_rows in (0, 1, 8):
        x = torch.randn(num_rows, shape[1], generator=torch.Generator().manual_seed(num_rows))
        assert weight.format.compiled_product(x, weight.plain, shape, weight.levels) is not None
        wanted = by_torch(monkeypatch, lambda x=x: weight.product(x))
        torch.testing.assert_close(weight.product(x), wanted, rtol=1e-5, atol=3e-5)  # sums of up to 160 products


@pytest.mark.parametrize("shape", [(16, 16), (300, 217), (40, 640)], ids=str)
@pytest.mark.parametrize("label", TILES)
def test_tiles(label: str, shape: tuple[int, int], monkeypatch) -> None:
    weight = quantized(label, shape)
    assert isinstance(weight.format, AbstractRotatedFormat)
    form, stored = weight.format, (weight.plain, shape, weight.levels)
    monkeypatch.setattr("quantizers.trellis_format.unpack", lambda *_: pytest.fail("not by a loop"))
    monkeypatch.setattr("quantizers.variable_trellis_format.unpack", lambda *_: pytest.fail("not by a loop"))
    form.decode_rotated(*stored)
    form.rotated_product(torch.randn(1, shape[1]), *stored)
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "LEAST_WEIGHTS", 1)
    wanted = by_torch(monkeypatch, lambda: form.decode_rotated(*stored))
    assert torch.equal(form.decode_rotated(*stored), wanted)
    for num_rows in (0, 1, 8):
        x = torch.randn(num_rows, shape[1])
        torch.testing.assert_close(form.rotated_product(x, *stored), x @ wanted.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_sequences", [1, 24, 61])
@pytest.mark.parametrize(("bits", "state_bits", "num_steps"), SEARCHES)
def test_the_search_for_codes_finds_the_same(bits: int, state_bits: int, num_steps: int, num_sequences: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    levels = torch.randn(2**state_bits, generator=draw)
    values = torch.randn(num_steps, num_sequences, generator=draw).T  # as strided as it may be
    found = encode(values, levels, bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantizers.trellis.compiled_paths", lambda *_: None)
        wanted = encode(values, levels, bits)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("least_costs", "costs_a_call"), [(2 * 8 * 40 * 64, 0), (2**20, 2**19)], ids=["size", "calls"])
def test_the_search_is_by_a_loop_once_that_pays(monkeypatch, least_costs: int, costs_a_call: int) -> None:
    draw = torch.Generator().manual_seed(5)
    levels, values = torch.randn(64, generator=draw), torch.randn(8, 40, generator=draw)
    monkeypatch.setattr(compiled, "_searched", compiled._Searched())
    monkeypatch.setattr(compiled, "LEAST_COSTS", least_costs)
    monkeypatch.setattr(compiled, "COSTS_A_CALL", costs_a_call)
    searched = []
    monkeypatch.setattr("quantizers.trellis._Viterbi.closed_path", _spied(searched))
    first, second = encode(values, levels, 2), encode(values, levels, 2)
    assert len(searched) == 1
    assert torch.equal(first, second)


def _spied(calls: list[Any]) -> Any:
    real = _Viterbi.closed_path

    def closed_path(self: _Viterbi, *arguments: torch.Tensor) -> torch.Tensor:
        calls.append(arguments)
        return real(self, *arguments)

    return closed_path


def test_loops_fuse_as_torch_does_whatever_the_defaults_are() -> None:
    from quantizers import cpu_viterbi

    wanted = cpu_viterbi._is_fused()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert cpu_viterbi._is_fused() == wanted == cpu_viterbi._FUSED
    finally:
        torch.set_default_dtype(torch.float32)


def test_threads_change_no_code() -> None:
    draw = torch.Generator().manual_seed(6)
    levels, values = torch.randn(64, generator=draw), torch.randn(200, 40, generator=draw)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(encode(values, levels, 2))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label", ["lloyd3-g32-s4", "trellis3"])
def test_the_product_is_in_the_dtype_of_what_is_multiplied(label: str, dtype: torch.dtype, monkeypatch) -> None:
    weight = quantized(label, (256, 96))
    x = torch.randn(2, 1, 96).to(dtype)
    y = weight.product(x)
    assert (y.dtype, y.shape) == (dtype, (2, 1, 256))
    wanted = by_torch(monkeypatch, lambda: weight.product(x.float()))
    assert (y.float() - wanted).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * wanted.norm()


@pytest.mark.parametrize("label", ["lloyd3-g32-s4", "trellis3", "vtrellis2.75"])
def test_threads_and_strides_change_no_bit(label: str, monkeypatch) -> None:
    weight = quantized(label, (130, 160))
    x = torch.randn(160, 3).T
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found += [weight.product(x), weight.product(x.contiguous())]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found)
    torch.testing.assert_close(found[0], by_torch(monkeypatch, lambda: weight.product(x)), rtol=1e-4, atol=1e-4)


def test_defaults_of_the_process_do_not_matter() -> None:
    weight, x = quantized("trellis3", (64, 96)), torch.randn(1, 96)
    wanted = weight.product(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = weight.product(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("label", ["lloyd3-g32-s4", "trellis3"])
def test_a_nan_comes_through_and_so_does_a_gradient(label: str) -> None:
    weight, x = quantized(label, (64, 96)), torch.randn(1, 96)
    x[0, 5] = torch.nan
    assert weight.product(x).isnan().all()
    x = torch.randn(1, 96, requires_grad=True)
    (gradient,) = torch.autograd.grad(weight.product(x).sum(), x)
    torch.testing.assert_close(gradient[0], weight.dequantize().sum(dim=0), rtol=1e-4, atol=1e-4)


def test_what_the_loops_do_not_serve_is_left_to_torch() -> None:
    weight, odd = quantized("lloyd3-g32-s4", (64, 96)), quantized("lloyd3-g32-s4", (64, 70))
    product = weight.format.compiled_product
    assert product(torch.randn(9, 96), weight.plain, weight.shape, weight.levels) is None  # many rows
    assert product(torch.randn(1, 96, dtype=torch.float64), weight.plain, weight.shape, weight.levels) is None
    assert product(torch.empty(1, 96, device="meta"), weight.plain, weight.shape, weight.levels) is None
    assert odd.format.compiled_product(torch.randn(1, 70), odd.plain, odd.shape, odd.levels) is None
    assert odd.product(torch.randn(1, 70)).shape == (1, 64)


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale_packed", "weight_scale_step"])
def test_blocks_that_are_cut_off_are_an_error(name: str) -> None:
    weight = quantized("lloyd3-g32-s4", (64, 96))
    cut = weight.plain | {name: weight.plain[name][:-1]}
    with pytest.raises(ValueError, match="damaged"):
        weight.format.compiled_product(torch.randn(1, 96), cut, weight.shape, weight.levels)


@pytest.mark.parametrize("label", ["trellis3", "vtrellis2.75"])
def test_tiles_that_are_cut_off_are_an_error(label: str) -> None:
    weight = quantized(label, (64, 96))
    cut = weight.plain | {"weight_packed": weight.plain["weight_packed"][:-1]}
    for run in (
        weight.format.decode_rotated,
        lambda *stored: weight.format.rotated_product(torch.ones(1, 96), *stored),
    ):
        with pytest.raises(ValueError, match="damaged"):
            run(cut, weight.shape, weight.levels)
    with pytest.raises(ValueError, match="damaged"):
        weight.format.decode_rotated(weight.plain, weight.shape, weight.levels[:-1])


def test_other_dtypes_and_grids_are_an_error() -> None:
    blocks, tiles = quantized("lloyd3-g32-s4", (64, 96)), quantized("vtrellis2.75", (64, 96))
    narrow = blocks.plain | {"weight_packed": blocks.plain["weight_packed"].to(torch.int8)}
    with pytest.raises(ValueError, match="damaged"):
        blocks.format.compiled_product(torch.randn(1, 96), narrow, blocks.shape, blocks.levels)
    with pytest.raises(ValueError, match="damaged"):
        tiles.format.rotated_product(torch.randn(1, 160), tiles.plain, (64, 160), tiles.levels)


def test_a_loop_that_fails_is_left_to_torch_with_one_warning(monkeypatch) -> None:
    weight, x = quantized("lloyd3-g32-s4", (64, 96)), torch.randn(1, 96)
    wanted = weight.product(x)

    def fails(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    loops = compiled._loops()
    assert loops is not None
    monkeypatch.setattr(compiled, "_given_up", [])
    monkeypatch.setitem(loops.PRODUCT_BLOCKS, 3, fails)
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR") as seen:
        found = [weight.product(x) for _ in range(2)]
    torch.testing.assert_close(found[1], wanted, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


def test_a_packed_head_is_multiplied_without_being_decoded(monkeypatch) -> None:
    weight = quantized("lloyd4-g32-s6", (384, 64))
    head = QuantizedHead((384, 64), weight.format, torch.float32, bias=False)
    head.fill(weight)
    x = torch.randn(1, 2, 64, requires_grad=True)
    with monkeypatch.context() as patch:
        patch.setattr("quantizers.embedding.decode_runs", lambda quantized: pytest.fail("decoded"))
        y = head(x)
    torch.testing.assert_close(y, x @ weight.dequantize().T, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, weight.dequantize().sum(dim=0).expand(1, 2, -1), rtol=1e-4, atol=1e-4)


FAILURES = [
    (ModuleNotFoundError("no numba", name="numba"), 0),
    (ImportError("Numba needs NumPy 2.5 or less"), 1),
    (OSError("no LLVM"), 1),
]


@pytest.mark.parametrize(("error", "num_warnings"), FAILURES, ids=["missing", "another NumPy", "no LLVM"])
def test_without_numba_torch_does_it(error: Exception, num_warnings: int, monkeypatch) -> None:
    weight, x = quantized("lloyd3-g32-s4", (64, 96)), torch.randn(1, 96)
    wanted = weight.product(x)
    real = builtins.__import__

    def fails(name: str, *others: Any) -> Any:
        if name == "quantizers" and others[2] and "cpu_loops" in others[2]:
            raise error
        return real(name, *others)

    monkeypatch.setattr(compiled, "_given_up", [])
    compiled._loops.cache_clear()
    try:
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as seen:
            patch.setattr(builtins, "__import__", fails)
            warnings.simplefilter("always")
            found = [weight.product(x) for _ in range(2)]
    finally:
        compiled._loops.cache_clear()
    torch.testing.assert_close(found[1], wanted, rtol=1e-5, atol=1e-5)
    assert compiled.is_there() == (num_warnings == 0)
    assert len([each for each in seen if "numba does not work here" in str(each.message)]) == num_warnings
