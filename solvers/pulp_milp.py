"""The exact integer program, through PuLP: which changes of a known allocation save the most?

    minimise  sum_k (added_cost_k + price * extra_bits_k) x_k + price * unused_bits
    subject to  sum_k extra_bits_k x_k + unused_bits = spare_bits,  at most one change a row

The objective is the added cost, shifted by a constant. In this form the terms of a better allocation are
no larger than the gap that is left; in units of that gap, solver tolerances are tiny fractions of it.
"""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pulp

FEASIBILITY_TOLERANCE = 1e-9
BOUND_TOLERANCE = 1e-8
"""Share of `cost_unit` by which a solver's bound may be wrong: given away from every bound."""


@dataclass(frozen=True, eq=False)
class ChangeProgram:
    """Changes of a known allocation, of which at most one a row may be made.

    Attributes:
        row: int64 [changes], rising.
        added_cost: float64 [changes], negative where the change saves.
        extra_bits: int64 [changes], negative where the change frees bits.
        spare_bits: what the known allocation leaves of the budget, >= 0.
        price: cost per bit, > 0.
        cost_unit: the most that the changes can possibly save, > 0.
    """

    row: np.ndarray
    added_cost: np.ndarray
    extra_bits: np.ndarray
    spare_bits: int
    price: float
    cost_unit: float


@dataclass(frozen=True, eq=False)
class Changes:
    """What the solver says, not yet checked.

    Attributes:
        taken: int64, indices of the changes to make.
        lower_bound: no set of changes that fits adds less cost than this; -inf where the solver does not say.
        solver: its name, with a remark where it stood in for another.
    """

    taken: np.ndarray
    lower_bound: float
    solver: str


def solve_highs(program: ChangeProgram, *, allowed_gap: float, time_limit_seconds: float) -> Changes:
    """HiGHS in this process; CBC, with a remark in `solver`, where highspy is not installed or fails.

    (highspy 1.15 raises `ValueError: vector::reserve` on some programs in which many changes cost the same.)

    Args:
        allowed_gap: stop once the cost is proven to be within this of the best.
        time_limit_seconds: stop then in any case.
    Reference:
        Huangfu and Hall 2018, Parallelizing the dual revised simplex method. Math. Prog. Comp. 10(1).
    """

    def stand_in(reason: str) -> Changes:
        changes = solve_cbc(program, allowed_gap=allowed_gap, time_limit_seconds=time_limit_seconds)
        return Changes(changes.taken, changes.lower_bound, f"{changes.solver} ({reason})")

    if importlib.util.find_spec("highspy") is None:
        return stand_in("highspy is not installed")
    import pulp

    model = _build(program)
    highs = pulp.HiGHS(
        msg=False,
        gapRel=0.0,
        gapAbs=allowed_gap / program.cost_unit,
        timeLimit=time_limit_seconds,
        threads=1,
        mip_feasibility_tolerance=FEASIBILITY_TOLERANCE,
        primal_feasibility_tolerance=FEASIBILITY_TOLERANCE,
        dual_feasibility_tolerance=FEASIBILITY_TOLERANCE,
    )
    try:
        model.solve(highs)
    except ValueError as error:
        return stand_in(f"highspy failed: {error}")
    bound = model.solverModel.getInfo().mip_dual_bound
    return Changes(_taken(model, program), _in_cost(bound, program), "highs")


def solve_cbc(program: ChangeProgram, *, allowed_gap: float, time_limit_seconds: float) -> Changes:
    """The CBC that PuLP brings along, in a process of its own; tells a bound only where it finishes.

    Raises:
        RuntimeError: this installation of PuLP has no CBC that runs here.
    """
    import pulp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PuLP 4 renames it
        solver = pulp.PULP_CBC_CMD(
            msg=False,
            gapRel=0.0,
            gapAbs=allowed_gap / program.cost_unit,
            timeLimit=time_limit_seconds,
            threads=1,
            options=[
                f"{tolerance} {FEASIBILITY_TOLERANCE}"
                for tolerance in ("primalTolerance", "dualTolerance", "integerTolerance", "increment")
            ],
        )
        if not solver.available():
            raise RuntimeError(
                "The CBC that PuLP brings along cannot be executed here, and HiGHS is missing or was not "
                'asked for. Install HiGHS with `pip install highspy` and use solver="highs".'
            )
        model = _build(program)
        model.solve(solver)
    is_finished = model.sol_status == pulp.LpSolutionOptimal
    bound = pulp.value(model.objective) - allowed_gap / program.cost_unit if is_finished else -np.inf
    return Changes(_taken(model, program), _in_cost(bound, program), "cbc")


SOLVERS: dict[str, Callable[..., Changes]] = {"highs": solve_highs, "cbc": solve_cbc}
"""Name -> function of a `ChangeProgram`; a new solver is a new row."""


def _build(program: ChangeProgram) -> "pulp.LpProblem":
    import pulp

    bits_unit = program.cost_unit / program.price
    change = [pulp.LpVariable(f"change_{index}", cat=pulp.LpBinary) for index in range(len(program.row))]
    unused = pulp.LpVariable("unused", lowBound=0)
    priced = (program.added_cost + program.price * program.extra_bits) / program.cost_unit
    bits = program.extra_bits / bits_unit

    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    model += pulp.LpAffineExpression([*zip(change, priced.tolist(), strict=True), (unused, 1.0)])
    used = pulp.LpAffineExpression([*zip(change, bits.tolist(), strict=True), (unused, 1.0)])
    model += used == program.spare_bits / bits_unit
    for first, end in _runs(program.row):
        model += pulp.LpAffineExpression([(variable, 1) for variable in change[first:end]]) <= 1
    return model


def _runs(row: np.ndarray) -> list[tuple[int, int]]:
    starts = np.flatnonzero(np.diff(row, prepend=-1)).tolist()
    return list(zip(starts, [*starts[1:], len(row)], strict=True))


def _taken(model: "pulp.LpProblem", program: ChangeProgram) -> np.ndarray:
    """One change a row at most, by the largest value above one half."""
    value = {variable.name: variable.value() or 0.0 for variable in model.variables()}
    values = np.array([value[f"change_{index}"] for index in range(len(program.row))])
    largest = [first + int(np.argmax(values[first:end])) for first, end in _runs(program.row)]
    return np.array([index for index in largest if values[index] > 0.5], dtype=np.int64)


def _in_cost(bound: float, program: ChangeProgram) -> float:
    return (bound - BOUND_TOLERANCE) * program.cost_unit - program.price * program.spare_bits
