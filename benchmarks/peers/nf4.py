"""bitsandbytes' NF4 with double quantization (QLoRA, arXiv:2305.14314): no data, 4 bits only."""

from bitsandbytes import matmul_4bit
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from benchmarks.peers.job import Quantized, Request, main, projections


def quantize(request: Request) -> Quantized:
    """Quantize and dequantize every matrix with bitsandbytes' own functions."""
    if request.bits != 4:
        raise ValueError(f"bitsandbytes has no NormalFloat of {request.bits} bits. Ask for 4.")
    answer = Quantized({"quant_type": "nf4", "compress_statistics": True})
    for name, weight in projections(request.model):
        weight = weight.float()
        packed, state = quantize_4bit(weight, blocksize=request.group, compress_statistics=True, quant_type="nf4")
        answer.weights[name] = dequantize_4bit(packed, state).view(weight.shape)
        answer.store("codes", [packed])
        answer.store("scales", [state.absmax, state.state2.absmax, state.offset])
        answer.check_forward(
            answer.weights[name], lambda x, packed=packed, state=state: matmul_4bit(x, packed.t(), state)
        )
    return answer


if __name__ == "__main__":
    main("nf4", ("bitsandbytes",), quantize)
