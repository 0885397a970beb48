"""Run by test_without_triton.py: a machine without Triton imports the package, and multiplies with one warning."""

import sys
import warnings
from importlib.abc import MetaPathFinder


class NoTriton(MetaPathFinder):
    """Finds that Triton is not there."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def main() -> None:
    """Prints the warning."""
    sys.meta_path.insert(0, NoTriton())
    import torch

    from quantizers import NormalFloat, QuantizedLinear
    from quantizers.kernels.switch import KERNELS

    assert "triton" not in sys.modules
    quantized = NormalFloat(4).quantize(torch.ones(3, 70))
    layer = QuantizedLinear.from_quantized(quantized, None)
    KERNELS.device_types = ("cpu",)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in (1, 2, 40):
            x = torch.ones(rows, 70)
            torch.testing.assert_close(layer(x), x @ quantized.dequantize().T)
    (warning,) = caught
    print(warning.message)


if __name__ == "__main__":
    main()
