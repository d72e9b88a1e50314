"""The range that clips nothing, and a range that clips a fixed share."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.errors import InputError
from jquant.formats import Format
from jquant.ranges.base import ends, split


@dataclass(frozen=True)
class MinMax:
    """The whole range of each group: nothing clips."""

    needs = frozenset()

    def __call__(self, w: Float[Array, "in out"], format: Format) -> tuple[Array, Array | None]:
        """See `Range`."""
        return format.grid(*ends(split(w, format)[0]))


@dataclass(frozen=True)
class Percentile:
    """From the (100 − p)-th to the p-th percentile of each group, interpolated linearly between its members.

    In groups of a few hundred members the default is almost min-max: 0.01 % is less than one member.

    Attributes:
      percent: p, above 50 and at most 100.
    """

    percent: float = 99.99

    needs = frozenset()

    def __post_init__(self) -> None:
        if not 50 < self.percent <= 100:
            raise InputError(f"Percentile takes a number above 50 and at most 100, not {self.percent}.")

    def __call__(self, w: Float[Array, "in out"], format: Format) -> tuple[Array, Array | None]:
        """See `Range`."""
        groups, real, _ = split(w, format)
        members = jnp.where(real == 1, groups, jnp.nan)
        low, high = jnp.nanquantile(members, jnp.asarray([1 - self.percent / 100, self.percent / 100]), axis=-2)
        return format.grid(low, high)
