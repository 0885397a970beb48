"""`benchmarks.gpu_model` without a GPU: all of it runs, and a step of its decoding gives the right logits."""

import pytest
import torch

from benchmarks import gpu_model
from quantizers import QuantizedLinear

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_the_dry_run_fills_both_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_model, "LABELS", ("lloyd3-g64-s8", "trellis2-l8"))
    monkeypatch.setattr(gpu_model, "DECOMPOSED", ("lloyd3-g64-s8", "trellis2-l8", "trellis2-l8-r2-f4"))
    gpu_model.main(["--dry-run", "--layers", "1"])
    out = capsys.readouterr().out
    assert "a dry run, whose times mean nothing" in out
    for label in (*gpu_model.LABELS, *gpu_model.DECOMPOSED):
        assert out.count(f"\n| {label} | ") == (label in gpu_model.LABELS) + (label in gpu_model.DECOMPOSED)
    for line in out.splitlines()[-3:]:
        assert 0.005 < float(line.split("|")[-2]) < 0.3  # the error left


@without_gpu
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_model.main([])
    assert ended.value.code == gpu_model.NO_GPU


@pytest.mark.parametrize("label", ["lloyd3-g64-s8", "trellis2-l8"])
@torch.inference_mode()
def test_a_step_with_a_static_cache_is_a_pass_over_all_tokens(label: str) -> None:
    network = gpu_model.dense_network(gpu_model.TINY, 2, "cpu")
    gpu_model.pack(network, label)
    layers = [module for _, module in gpu_model.linear_layers(network)]
    assert len(layers) == 14
    assert all(isinstance(layer, QuantizedLinear) for layer in layers)
    with torch.no_grad():
        for layer in layers:
            layer.weight_scale_step.fill_(1e-3) if "lloyd" in label else layer.weight_scale.fill_(0.3)
    decoding = gpu_model.Decoding(network, 2)
    tokens = torch.cat([torch.arange(gpu_model.PROMPT_TOKENS), torch.tensor([100])]).expand(2, -1)
    expected = network(tokens).logits[:, -1:]
    assert expected.std() > 1e-3
    torch.testing.assert_close(decoding.step(), expected, rtol=1e-4, atol=1e-5)
    assert float((network(tokens[:, -1:]).logits - expected).abs().max()) > 1e-3  # the cache decides
