"""Exact rewrites of the network before rounding."""

from jquant.transforms.awq import AWQ
from jquant.transforms.base import Transform
from jquant.transforms.hadamard import Hadamard
from jquant.transforms.incoherence import Incoherence
from jquant.transforms.permutation import row_magnitude, sort_channels
from jquant.transforms.smoothquant import SmoothQuant

__all__ = ["AWQ", "Hadamard", "Incoherence", "SmoothQuant", "Transform", "row_magnitude", "sort_channels"]
