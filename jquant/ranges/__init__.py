"""How a group's scale and zero are chosen, before any code.

A range is a frozen dataclass called as `range(w, format, gram, clips)`; it returns scales and zeros as `Format.grid`
does (`[groups, columns]` each). `gram` is the Gram matrix of the weight's inputs, `clips` what the whole model's loss
makes of its groups' ranges; None where nothing was seen, and a range says in `needs` what it can't do without.
"""

from jquant.ranges.base import Range
from jquant.ranges.llama_cpp import LlamaCpp
from jquant.ranges.loss import LossSearch
from jquant.ranges.min_max import MinMax, Percentile
from jquant.ranges.search import Search

__all__ = ["LlamaCpp", "LossSearch", "MinMax", "Percentile", "Range", "Search"]
