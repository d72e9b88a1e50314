"""Round to nearest (RTN)."""

from dataclasses import dataclass

from jax import Array
from jaxtyping import Float

from jquant.qtensor import Grid
from jquant.rounding.base import Rounded


@dataclass(frozen=True)
class Nearest:
    """Each weight takes its nearest code."""

    needs = frozenset()

    def __call__(self, w: Float[Array, "in out"], grid: Grid) -> Rounded:
        """See `Rounding`."""
        return Rounded(grid.encode(w))
