"""Numbers in, answers out, each with a certificate.

`solve` and `pareto` share out a bit budget over matrices; importing this package costs a blink and no torch.
The low-rank approximations are in `solvers.low_rank`, which needs torch.
"""

from solvers.allocation import solve
from solvers.errors import InfeasibleBudgetError
from solvers.pareto import pareto
from solvers.problem import Allocation, AllocationProblem, Status
from solvers.pulp_milp import SOLVERS

__all__ = ["SOLVERS", "Allocation", "AllocationProblem", "InfeasibleBudgetError", "Status", "pareto", "solve"]
