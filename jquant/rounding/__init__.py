"""Which code each weight gets, on a grid that is already chosen.

A rounding is a frozen dataclass called as `rounding(w, scale, zero, gram, format, held_out=None)`. It is pure, runs
under jit and vmap, needs no communication when `out` is sharded (but for sums over `out`: the error it reports, a
damping or a scale that all columns share), and never asks which format it rounds to.
"""

from jquant.rounding.gptq import GPTQ
from jquant.rounding.info import Rounding, SolveInfo
from jquant.rounding.nearest import Nearest
from jquant.rounding.refit import Refit
from jquant.rounding.stochastic import Stochastic

__all__ = ["GPTQ", "Nearest", "Refit", "Rounding", "SolveInfo", "Stochastic"]
