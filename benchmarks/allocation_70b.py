"""How long does an exact allocation take for a model of 70 billion parameters?

560 matrices x 108 choices, synthetic but with real shapes and real storage counts, solved in one run by
`solvers.solve`, by PuLP + HiGHS and by `scipy.optimize.milp` on the whole program, at the same gap.

    python -m benchmarks.allocation_70b --num-seeds 5
"""

import argparse
import itertools
import os
import platform
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from solvers import AllocationProblem, solve
from solvers.pulp_milp import FEASIBILITY_TOLERANCE

NUM_LAYERS = 80
HIDDEN, KEY_VALUE, INTERMEDIATE = 8192, 1024, 28_672
SHAPES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (KEY_VALUE, HIDDEN),
    "v_proj": (KEY_VALUE, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
"""[out, in] of Llama 2 70B: Touvron et al. 2023, arXiv:2307.09288."""

BITS, BLOCK_SIZES, SCALE_BITS, SUPER_BLOCK_SIZES = (2, 3, 4, 8), (16, 32, 64), (2, 4, 8), (16, 64, 256)
CHOICES = list(itertools.product(BITS, BLOCK_SIZES, SCALE_BITS, SUPER_BLOCK_SIZES))


@dataclass(frozen=True)
class Result:
    """One method on one instance; `cost` and `size_bits` are recounted from the tables, nan and 0 if none."""

    method: str
    seconds: float
    cost: float
    size_bits: int
    lower_bound: float


def build_problem(seed: int, bits_per_param: float) -> AllocationProblem:
    """Sensitivities log-normal by matrix; distortion by bits, block and scales, with 2 % of noise."""
    rng = np.random.default_rng(seed)
    num_params = np.array([out * into for out, into in SHAPES.values()] * NUM_LAYERS)
    size_bits = np.stack([_stored_bits(num_params, *choice) for choice in CHOICES], axis=1)
    sensitivity = num_params * rng.lognormal(sigma=1.5, size=len(num_params))
    distortion = np.array([_distortion(*choice) for choice in CHOICES])
    noise = rng.lognormal(sigma=0.02, size=size_bits.shape)
    budget_bits = int(bits_per_param * int(num_params.sum()))
    return AllocationProblem(sensitivity[:, None] * distortion * noise, size_bits, budget_bits)


def _stored_bits(num_params: np.ndarray, bits: int, block: int, scale_bits: int, super_block: int) -> np.ndarray:
    """Codes, quantized scales, and a float32 scale for each super-block of scales."""
    num_blocks = num_params // block
    return num_params * bits + num_blocks * scale_bits + num_blocks // super_block * 32


def _distortion(bits: int, block: int, scale_bits: int, super_block: int) -> float:
    """Squared error of a Gaussian weight: scales follow the block's largest value, and are coarse."""
    scale_variance = 2 * np.log(2 * block)
    coarse_scale = 1 + 2 * np.log2(super_block) * 4.0**-scale_bits
    return float(scale_variance * coarse_scale * 4.0**-bits)


def solve_ours(problem: AllocationProblem, relative_gap: float, time_limit_seconds: float) -> Result:
    started = time.perf_counter()
    answer = solve(problem, relative_gap=relative_gap, time_limit_seconds=time_limit_seconds)
    return _result("ours", problem, started, answer.choice, answer.lower_bound)


def solve_pulp(problem: AllocationProblem, relative_gap: float, time_limit_seconds: float) -> Result:
    """The whole program, as one would write it down; only scaled by the budget and the median cost."""
    return _solve_pulp("PuLP + HiGHS, unpruned", problem, relative_gap, time_limit_seconds)


def solve_pulp_tight(problem: AllocationProblem, relative_gap: float, time_limit_seconds: float) -> Result:
    """The same with the solver's tolerances as in `solvers.pulp_milp`, so that it overspends less."""
    names = ("mip", "primal", "dual")
    tight = {f"{name}_feasibility_tolerance": FEASIBILITY_TOLERANCE for name in names}
    method = "PuLP + HiGHS, unpruned, tolerances 1e-9"
    return _solve_pulp(method, problem, relative_gap, time_limit_seconds, **tight)


def _solve_pulp(
    method: str, problem: AllocationProblem, relative_gap: float, time_limit_seconds: float, **options: float
) -> Result:
    import pulp

    started = time.perf_counter()
    cost_unit = float(np.median(problem.cost))
    rows = [
        [pulp.LpVariable(f"x_{row}_{column}", cat=pulp.LpBinary) for column in range(problem.num_choices)]
        for row in range(problem.num_matrices)
    ]
    cells = [variable for row in rows for variable in row]
    model = pulp.LpProblem("whole", pulp.LpMinimize)
    model += pulp.LpAffineExpression(zip(cells, (problem.cost.ravel() / cost_unit).tolist(), strict=True))
    bits = (problem.size_bits.ravel() / problem.budget_bits).tolist()
    model += pulp.LpAffineExpression(zip(cells, bits, strict=True)) <= 1
    for row in rows:
        model += pulp.lpSum(row) == 1
    model.solve(pulp.HiGHS(msg=False, gapRel=relative_gap, timeLimit=time_limit_seconds, threads=1, **options))
    taken = np.array([variable.value() or 0.0 for variable in cells])
    bound = model.solverModel.getInfo().mip_dual_bound * cost_unit
    return _result(method, problem, started, _choice(taken, problem), bound)


def solve_scipy(problem: AllocationProblem, relative_gap: float, time_limit_seconds: float) -> Result:
    """The same program and scaling; some builds of SciPy print lines of their own while they solve."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix, eye_array, kron

    started = time.perf_counter()
    cost_unit = float(np.median(problem.cost))
    one_a_row = kron(eye_array(problem.num_matrices), np.ones((1, problem.num_choices)), format="csr")
    budget = csr_matrix(problem.size_bits.reshape(1, -1) / problem.budget_bits)
    answer = milp(
        problem.cost.ravel() / cost_unit,
        integrality=np.ones(problem.cost.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_a_row, 1, 1), LinearConstraint(budget, -np.inf, 1)],
        options={"mip_rel_gap": relative_gap, "time_limit": time_limit_seconds},
    )
    choice = None if answer.x is None else _choice(answer.x, problem)
    bound = answer.mip_dual_bound * cost_unit if answer.mip_dual_bound is not None else -np.inf
    return _result("scipy.optimize.milp, unpruned", problem, started, choice, bound)


METHODS = [solve_ours, solve_pulp, solve_pulp_tight, solve_scipy]


def _choice(taken: np.ndarray, problem: AllocationProblem) -> np.ndarray | None:
    """The choice per matrix, or None where the values are no allocation."""
    table = taken.reshape(problem.cost.shape)
    choice = table.argmax(axis=1)
    return choice if (table[np.arange(len(table)), choice] > 0.5).all() else None


def _result(
    method: str, problem: AllocationProblem, started: float, choice: np.ndarray | None, lower_bound: float
) -> Result:
    seconds = time.perf_counter() - started
    if choice is None:
        return Result(method, seconds, float("nan"), 0, lower_bound)
    rows = np.arange(problem.num_matrices)
    cost, size_bits = problem.cost[rows, choice].sum(), problem.size_bits[rows, choice].sum()
    return Result(method, seconds, float(cost), int(size_bits), lower_bound)


def _row(results: list[Result], problems: list[AllocationProblem], best: list[float]) -> str:
    seconds = [result.seconds for result in results]
    gap = max((result.cost - result.lower_bound) / result.cost for result in results)
    overspent = [result.size_bits - p.budget_bits for result, p in zip(results, problems, strict=True)]
    within = [
        result.cost / least - 1
        for result, least, bits in zip(results, best, overspent, strict=True)
        if result.size_bits and bits <= 0
    ]
    excess = f"{max(within):.1e}" if within else "-"
    method, median = results[0].method, statistics.median(seconds)
    return (
        f"| {method} | {median:.2f} | {min(seconds):.2f} to {max(seconds):.2f} "
        f"| {gap:.1e} | {len(within)} of {len(results)} | {max(0, *overspent):,} | {excess} |"
    )


def _cheapest_within(results: tuple[Result, ...], problem: AllocationProblem) -> float:
    return min(result.cost for result in results if 0 < result.size_bits <= problem.budget_bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--bits-per-param", type=float, default=2.75)
    parser.add_argument("--relative-gap", type=float, default=1e-6)
    parser.add_argument("--time-limit-seconds", type=float, default=60.0)
    arguments = parser.parse_args()

    problems = [build_problem(seed, arguments.bits_per_param) for seed in range(arguments.num_seeds)]
    limits = (arguments.relative_gap, arguments.time_limit_seconds)
    solve_ours(build_problem(10_000, arguments.bits_per_param), *limits)  # imports PuLP and HiGHS for all
    table = [[method(problem, *limits) for problem in problems] for method in METHODS]
    by_problem = zip(zip(*table, strict=True), problems, strict=True)
    best = [_cheapest_within(results, problem) for results, problem in by_problem]

    matrices, choices = problems[0].cost.shape
    print(f"### Exact allocation for a 70B model, {time.strftime('%Y-%m-%d')}\n")
    print(
        f"{matrices} matrices x {choices} choices, {arguments.bits_per_param} bits per parameter, "
        f"{arguments.num_seeds} seeds, relative gap {arguments.relative_gap:g}, "
        f"time limit {arguments.time_limit_seconds:g} s, one solver thread where it can be set.\n"
    )
    print("| method | median s | range s | worst gap | within budget | most bits over | worst excess |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for results in table:
        print(_row(results, problems, best))
    versions = ", ".join(f"{name} {version(name)}" for name in ("pulp", "highspy", "scipy", "numpy"))
    print(f"\n{platform.machine()}, {os.cpu_count()} cores; {versions}, Python {platform.python_version()}.")
    print("Seconds include building and reducing the program. Cost and size are recounted from the tables;")
    print("excess is the cost above the cheapest answer within the budget, over the answers within it.")


if __name__ == "__main__":
    main()
