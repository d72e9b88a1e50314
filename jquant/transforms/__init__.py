"""Exact rewrites of the network before rounding."""

from jquant.transforms.awq import AWQ
from jquant.transforms.base import Transform
from jquant.transforms.hadamard import Hadamard, Rotation
from jquant.transforms.permutation import row_magnitude, sort_channels
from jquant.transforms.smoothquant import SmoothQuant

__all__ = ["AWQ", "Hadamard", "Rotation", "SmoothQuant", "Transform", "row_magnitude", "sort_channels"]
