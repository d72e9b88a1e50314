"""Ranges choose each group's scale and zero, before any code is chosen.

A range is a frozen dataclass called as `range(w, format)`; it returns scales and zeros like `Format.grid`
(`[groups, columns]` each). The names in its `needs` are its keywords: `range(w, format, gram=…)`.
"""

from jquant.ranges.base import Range
from jquant.ranges.llama_cpp import LlamaCpp
from jquant.ranges.loss import LossSearch
from jquant.ranges.min_max import MinMax, Percentile
from jquant.ranges.rms import RMS
from jquant.ranges.search import Search

__all__ = ["RMS", "LlamaCpp", "LossSearch", "MinMax", "Percentile", "Range", "Search"]
