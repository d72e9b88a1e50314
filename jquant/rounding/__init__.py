"""Roundings choose each weight's code on a given grid.

A rounding is a frozen dataclass called as `rounding(w, grid)`; the names in its `needs` are its keywords:
`rounding(w, grid, gram=…)`. It is pure, runs under jit and vmap, and works for every format. If `out` is sharded, only
sums over `out` communicate: of a damping or a scale that all columns share.
"""

from jquant.rounding.aqlm import AQLM
from jquant.rounding.base import Rounded, Rounding
from jquant.rounding.gptq import GPTQ
from jquant.rounding.info import SolveInfo, round_to_grid
from jquant.rounding.lnq import LNQ
from jquant.rounding.nearest import Nearest
from jquant.rounding.refit import Refit
from jquant.rounding.stochastic import Stochastic
from jquant.rounding.two_sided import TwoSided

__all__ = [
    "AQLM",
    "GPTQ",
    "LNQ",
    "Nearest",
    "Refit",
    "Rounded",
    "Rounding",
    "SolveInfo",
    "Stochastic",
    "TwoSided",
    "round_to_grid",
]
