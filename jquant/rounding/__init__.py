"""Which code each weight gets, on a grid that is already chosen.

A rounding is a frozen dataclass called as `rounding(w, scale, zero, gram, format)`. It is pure, runs under jit and
vmap, needs no communication when `out` is sharded, and never asks which format it rounds to.
"""

from jquant.rounding.gptq import GPTQ
from jquant.rounding.info import Rounding, SolveInfo
from jquant.rounding.nearest import Nearest

__all__ = ["GPTQ", "Nearest", "Rounding", "SolveInfo"]
