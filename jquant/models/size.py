"""How many bytes a model takes."""

import math
from dataclasses import dataclass
from typing import Any

import jax

from jquant.models.params import flat_params


@dataclass(frozen=True)
class Size:
    """The size of a decoder, or of a part of one; sizes add up.

    Attributes:
      weights: number of weights in the blocks' projections.
      projections: bytes of the projections: codes, scales and zeros.
      total: bytes of all parameters.
    """

    weights: int = 0
    projections: int = 0
    total: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(self.weights + other.weights, self.projections + other.projections, self.total + other.total)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the projections."""
        return 8 * self.projections / self.weights

    @property
    def megabytes(self) -> float:
        """Size of all parameters; a megabyte is a million bytes."""
        return self.total / 1e6


def size_of(module: Any) -> Size:
    """The size of a decoder, with its blocks or without, or of a block."""
    params = flat_params(module)
    kernels = [leaf for name, leaf in params.items() if name.endswith("kernel") and name != "head.kernel"]
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return Size(sum(math.prod(leaf.shape) for leaf in kernels), sum(leaf.nbytes for leaf in kernels), total)
