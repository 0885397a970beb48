import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.budget import UNITS_BYTES, Budget, human_bytes, parse_budgets
from pipeline.errors import BudgetError
from registry import checked_name


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


BUDGETS = st.lists(
    st.builds(
        "{}{}{}".format, st.integers(1, 10**6), st.sampled_from(["", " "]), st.sampled_from(["bpw", "%", *UNITS_BYTES])
    ),
    min_size=1,
    max_size=6,
)


@given(BUDGETS)
def test_a_list_is_its_budgets_in_order_unless_two_mean_the_same(texts: list[str]) -> None:
    meanings = [(b.bits_per_param, b.size_bytes, b.share) for b in map(Budget.parse, texts)]
    if len(set(meanings)) < len(meanings):
        with pytest.raises(BudgetError, match="the same budget twice"):
            parse_budgets(",".join(texts))
    else:
        parsed = parse_budgets(", ".join(texts))
        assert [budget.text for budget in parsed] == texts
        assert len({checked_name(budget.label) for budget in parsed}) == len(texts)


def test_labels_are_as_written() -> None:
    labels = [budget.label for budget in parse_budgets("2.50bpw, 4.2 GiB,40 %")]
    assert labels == ["2.50bpw", "4.2GiB", "40pct"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3bpw,", "empty place"),
        (",", "empty place"),
        ("3bpw,,4bpw", "empty place"),
        ("3bpw,3.0bpw", "twice, as '3bpw' and as '3.0bpw'"),
        ("1MB,40%,1000 kB", "twice, as '1MB' and as '1000 kB'"),
        ("3bpw,4", "'4' is not a budget"),
        ("3bpw;4bpw", "'3bpw;4bpw' is not a budget"),
        ("", "'' is not a budget"),
    ],
)
def test_a_malformed_list_names_the_fault(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        parse_budgets(text)
