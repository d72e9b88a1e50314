"""What every rounding offers, and what it returns."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from jax import Array
from jaxtyping import Float

from jquant.qtensor import Grid


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rounded:
    """A weight's codes, and what a rounding has to say of how it found them.

    Attributes:
      codes: uint8 `[in, out]`, from 0 to 2^bits − 1.
      grid: the grid they belong to, where the rounding moved it; None where it is the one that was given.
      damping: what was added to H's diagonal, as a multiple of its mean.
      attempts: factorisations tried before one was finite.
      fallback: 1 where a finite H had no finite factorisation and weights were rounded plainly, else 0.
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
        """What it must be given beside weight and grid: "gram", "held_out", or own statistics (`Statistic`)."""
        ...

    def __call__(self, w: Float[Array, "in out"], grid: Grid, /, *_: Any, **seen: Any) -> Rounded:
        """The codes of `w` on the grid.

        Args:
          w: the weight.
          grid: the values that codes stand for, as a range chose them.
          seen: just what `needs` names, by name. "gram": mean x xᵀ over the calibration tokens, `[in, in]`.
            "held_out": the same over other windows.
        """
        ...
