"""Everything that can go wrong in a solver for a reason that the caller can mend.

A malformed problem is a plain `ValueError` at construction; what is left for this file is a
well-formed problem that has no answer.
"""


class InfeasibleBudgetError(ValueError):
    """No allocation fits the budget.

    Attributes:
        budget_bits: what was asked for.
        smallest_bits: the smallest budget that has an answer.
    """

    def __init__(self, budget_bits: int, smallest_bits: int) -> None:
        self.budget_bits = budget_bits
        self.smallest_bits = smallest_bits
        super().__init__(
            f"The budget of {budget_bits:,} bits is {smallest_bits - budget_bits:,} bits below the smallest "
            f"allocation, {smallest_bits:,} bits (every matrix or group at its smallest choice). "
            f"Raise the budget to at least {smallest_bits:,} bits, or add a smaller choice."
        )

    def __reduce__(self) -> tuple[type["InfeasibleBudgetError"], tuple[int, int]]:
        return type(self), (self.budget_bits, self.smallest_bits)
