"""The contract of every rounding, and its result."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from jax import Array
from jaxtyping import Float

from jquant.qtensor import Grid

NOISE = 1e-6  # relative to a sum's terms: a smaller float32 sum may be rounding error only


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rounded:
    """A weight's codes, and how the rounding found them.

    Attributes:
      codes: uint8 `[in, out]`, from 0 to 2^bits − 1.
      grid: the codes' grid if the rounding changed it; None for the given grid.
      damping: added to H's diagonal, as a multiple of its mean.
      attempts: factorisations tried until one was finite.
      fallback: 1 if no factorisation was finite and weights were rounded to nearest, else 0.
    """

    codes: Any
    grid: Grid | None = None
    damping: Any = 0.0
    attempts: Any = 0
    fallback: Any = 0


@runtime_checkable
class Rounding(Protocol):
    """The contract of every rounding."""

    @property
    def needs(self) -> frozenset[Any]:
        """The keywords of its call: "gram", "held_out", or statistics of one's own (`Statistic`)."""
        ...

    def __call__(self, w: Float[Array, "in out"], grid: Grid, /, *_: Any, **seen: Any) -> Rounded:
        """The codes of `w` on the grid.

        Args:
          w: the weight.
          grid: the codes' values, from a range.
          seen: only what `needs` names, by name. "gram": mean x xᵀ over the calibration tokens, `[in, in]`.
            "held_out": the same over other windows.
        """
        ...
