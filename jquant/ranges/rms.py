"""Scales from each group's root mean square."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.errors import InputError
from jquant.formats import Format
from jquant.ranges.base import split


@dataclass(frozen=True)
class RMS:
    """From −d to d root mean squares of each group: a range for weights that are about normal, as rotated ones are.

    One outlier moves it less than it moves `MinMax`.

    Attributes:
      deviations: d; None for the format's own, with the least squared error on normal weights. Formats with tiles
        have one.
    """

    deviations: float | None = None

    needs = frozenset()

    def __post_init__(self) -> None:
        if self.deviations is not None and not 0 < self.deviations < math.inf:
            raise InputError(f"RMS takes a positive number of deviations, or None, not {self.deviations!r}.")

    def __call__(self, w: Float[Array, "in out"], format: Format) -> tuple[Array, Array | None]:
        """See `Range`.

        Raises:
          InputError: `deviations` is None and the format has no number of its own.
        """
        deviations = self.deviations or getattr(format, "deviations", None)
        if deviations is None:
            raise InputError(f"{type(format).__name__} has no deviations of its own: give RMS a number.")
        groups, real, _ = split(w, format)
        end = deviations * jnp.sqrt(jnp.sum(groups**2, -2) / jnp.sum(real, -2))
        return format.grid(-end, end)
