import pytest

from pipeline.budget import Budget, human_bytes
from pipeline.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "limit"),
    [("180MB", 180_000_000), ("4.2GiB", int(4.2 * 2**30)), ("1500 kB", 1_500_000), ("40%", 400), ("7B", 7)],
)
def test_byte_budgets_count_the_folder(text: str, limit: int) -> None:
    assert Budget.parse(text).limit_bytes(original_bytes=1000) == limit


def test_bits_per_parameter() -> None:
    budget = Budget.parse("2.75bpw")
    assert budget.bits_per_param == 2.75
    assert budget.limit_bytes(original_bytes=1000) is None


@pytest.mark.parametrize(
    "text", ["", "3", "3.0", "-3bpw", "0bpw", "bpw", "3 bits", "1e3MB", "40", "nanbpw", "3bpw 4bpw"]
)
def test_a_malformed_budget_says_what_was_expected(text: str) -> None:
    with pytest.raises(BudgetError, match=r"2\.75bpw.*180MB"):
        Budget.parse(text)


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (1234567, "1.23 MB"), (4.2e12, "4.20 TB")])
def test_human_bytes(size: float, text: str) -> None:
    assert human_bytes(size) == text
