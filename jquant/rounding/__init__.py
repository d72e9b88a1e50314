"""Which code each weight gets, on a grid that is already chosen.

A rounding is a frozen dataclass called as `rounding(w, grid)`; what it names in `needs` comes as keywords:
`rounding(w, grid, gram=…)`. It is pure, runs under jit and vmap, needs no communication when `out` is sharded (but for
sums over `out`: a damping or a scale that all columns share), and never asks which format it rounds to.
"""

from jquant.rounding.base import Rounded, Rounding
from jquant.rounding.gptq import GPTQ
from jquant.rounding.info import SolveInfo, round_to_grid
from jquant.rounding.nearest import Nearest
from jquant.rounding.refit import Refit
from jquant.rounding.stochastic import Stochastic

__all__ = ["GPTQ", "Nearest", "Refit", "Rounded", "Rounding", "SolveInfo", "Stochastic", "round_to_grid"]
