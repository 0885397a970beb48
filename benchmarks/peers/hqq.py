"""HQQ (Badri and Shaji 2023, Half-Quadratic Quantization): no data; scales and zero points in float16."""

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

from benchmarks.peers.job import Quantized, Request, main, projections


def quantize(request: Request) -> Quantized:
    """Turn every matrix into an `HQQLinear` with the package's default configuration for these bits."""
    config = BaseQuantizeConfig(nbits=request.bits, group_size=request.group)
    answer = Quantized(dict(config["weight_quant_params"]))
    for name, weight in projections(request.model):
        layer = HQQLinear.from_weights(weight, None, quant_config=config, compute_dtype=torch.float16, device="cpu")
        answer.weights[name] = layer.dequantize()
        answer.store("codes", [layer.W_q])
        answer.store("scales", [layer.meta["scale"]])
        answer.store("zero_points", [layer.meta["zero"]])
        answer.check_forward(answer.weights[name], layer)
    return answer


if __name__ == "__main__":
    main("hqq", ("hqq",), quantize)
