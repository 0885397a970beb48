"""Labels name quantizers, and outsiders can add theirs."""

from dataclasses import dataclass, replace

import pytest

from quantizers import (
    QUANTIZERS,
    AbstractBlockFormat,
    AbstractQuantizer,
    Integer,
    KMeans,
    LatticeCoded,
    LloydMax,
    LowRankPlus,
    NormalFloat,
    TrellisCoded,
    VariableTrellis,
    quantizer_from_label,
    registered,
)
from tests.quantizers.helpers import ALL_QUANTIZERS, quantizer_id


@pytest.mark.parametrize("quantizer", ALL_QUANTIZERS, ids=quantizer_id)
def test_a_label_leads_back_to_the_format(quantizer: AbstractQuantizer) -> None:
    unnamed = {"super_block": 256} if isinstance(quantizer.format, AbstractBlockFormat) else {"seed": 0}
    found = quantizer_from_label(quantizer.format.label)
    assert found.format == replace(quantizer.format, **unnamed)
    assert found.format.label == quantizer.format.label


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("nf4", NormalFloat(4)),
        ("lloyd3", LloydMax(3)),
        ("lloyd3-g32", LloydMax(3, 32)),
        ("nf4-s4", NormalFloat(4, scale_bits=4)),
        ("nf2-r16", LowRankPlus(NormalFloat(2), 16)),
        ("lloyd2-g128-s6-r8", LowRankPlus(LloydMax(2, 128, 6), 8)),
        ("int3-g64-s4", Integer(3, 64, 4)),
        ("kmeans3-g64-s4", KMeans(3, 64, 4)),
        ("trellis2-l10", TrellisCoded(2, 10)),
        ("vtrellis2", VariableTrellis(2.0)),
        ("vtrellis2.375-l10-r2-f4", LowRankPlus(VariableTrellis(2.375, 10), 2, 4)),
        ("e8p2", LatticeCoded(2)),
        ("e8p3-r4-f8", LowRankPlus(LatticeCoded(3), 4, 8)),
        ("  NF4-G32  ", NormalFloat(4, 32)),
        ("nf4-r0", NormalFloat(4)),
    ],
)
def test_labels(label: str, expected: AbstractQuantizer) -> None:
    assert quantizer_from_label(label) == expected


@pytest.mark.parametrize(
    "label",
    [
        "",
        "nf",
        "4",
        "fp4",
        "nf4.",
        "vtrellis.5",
        "gptq4",
        "nf4-",
        "nf4-x8",
        "nf4-r8-g64",
        "nf4-g64-g32",
        "nf-4",
        "nf4 g64",
        "nf4-g",
        "nf4-g-1",
    ],
)
def test_a_malformed_label_is_explained(label: str) -> None:
    with pytest.raises(
        ValueError, match=r"is not a quantizer; expected NAME and BITS.* one of e8p, int, kmeans, lloyd, nf"
    ):
        quantizer_from_label(label)


@pytest.mark.parametrize(
    ("label", "setting"),
    [
        ("nf7", "bits is 7"),
        ("lloyd16", "bits is 16"),
        ("nf4-g48", "block_size is 48"),
        ("nf4-s9", "scale_bits is 9"),
        ("trellis2.5", "'trellis2.5' has 2.5 bits, but trellis takes whole numbers of them only"),
        ("lloyd3.0", "'lloyd3.0' has 3.0 bits"),
        ("vtrellis2.3", "bits is 2.3; it must be 1 to 5, in steps of 0.125"),
        ("vtrellis0.875", "bits is 0.875"),
        ("vtrellis2-l9", "state_bits is 9"),
    ],
)
def test_a_setting_out_of_range_is_named(label: str, setting: str) -> None:
    with pytest.raises(ValueError, match=setting):
        quantizer_from_label(label)


def test_every_registered_quantizer_has_a_label_and_a_row_in_the_table() -> None:
    assert {"nf", "lloyd"} <= set(QUANTIZERS)
    for name, family in QUANTIZERS.items():
        assert isinstance(quantizer_from_label(f"{name}4"), family)
        assert any(isinstance(quantizer, family) for quantizer in ALL_QUANTIZERS)


def test_an_entry_point_adds_a_quantizer_and_cannot_replace_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class EntryPoint:
        name: str
        target: type

        def load(self) -> type:
            return self.target

    asked = []

    def entry_points(*, group: str) -> list[EntryPoint]:
        asked.append(group)
        return [EntryPoint("theirs", LloydMax), EntryPoint("nf", LloydMax)]

    monkeypatch.setattr(registered, "entry_points", entry_points)
    assert registered._all.__wrapped__() == {
        "theirs": LloydMax,
        "nf": NormalFloat,
        "lloyd": LloydMax,
        "trellis": TrellisCoded,
        "vtrellis": VariableTrellis,
        "int": Integer,
        "kmeans": KMeans,
        "e8p": LatticeCoded,
    }
    assert asked == ["bitsmith.quantizers"]
