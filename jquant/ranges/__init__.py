"""How a group's scale and zero are chosen, before any code.

A range is a frozen dataclass called as `range(w, format)`; it returns scales and zeros as `Format.grid` does
(`[groups, columns]` each). What it names in `needs` comes as keywords: `range(w, format, gram=…)`.
"""

from jquant.ranges.base import Range
from jquant.ranges.llama_cpp import LlamaCpp
from jquant.ranges.loss import LossSearch
from jquant.ranges.min_max import MinMax, Percentile
from jquant.ranges.search import Search

__all__ = ["LlamaCpp", "LossSearch", "MinMax", "Percentile", "Range", "Search"]
