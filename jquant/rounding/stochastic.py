"""Stochastic rounding: unbiased."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, UInt32

from jquant.qtensor import Grid
from jquant.rounding.base import Rounded
from jquant.rounding.neighbours import neighbours


@dataclass(frozen=True)
class Stochastic:
    """Each weight takes one of the two grid values around it, with probabilities such that E[ŵ] = w.

    Weights beyond the grid take its end. (Croci et al. 2022, "Stochastic rounding: implementation, error analysis and
    applications", mode 1.)

    Attributes:
      seed: of the draws. Every column has its own key, folded from the seed, the column's index and a hash of its
        weights. So a weight always gets the same codes, other weights of that shape get independent draws, and a
        device needs only its own columns.
    """

    seed: int = 0

    needs = frozenset()

    def __call__(self, w: Float[Array, "in out"], grid: Grid) -> Rounded:
        """See `Rounding`."""
        below, above = neighbours(w, grid)
        low, high = grid.decode(below), grid.decode(above)
        gap = high - low
        chance = jnp.where(gap > 0, (w.astype(jnp.float32) - low) / jnp.where(gap > 0, gap, 1), 0)
        return Rounded(jnp.where(_draws(w, self.seed) < chance, above, below))


def _draws(w: Float[Array, "in out"], seed: int) -> Float[Array, "in out"]:
    """Uniform in [0, 1), column by column."""
    rows, out = w.shape

    def column(index: Array, hashed: Array) -> Array:
        # The generator is named, so no setting of JAX changes the codes.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)
        return jax.random.uniform(jax.random.fold_in(key, hashed), (rows,), jnp.float32)

    return jax.vmap(column, out_axes=1)(jnp.arange(out, dtype=jnp.uint32), _hash(w))


def _hash(w: Float[Array, "in out"]) -> UInt32[Array, " out"]:
    """A hash of each column modulo 2³²: the sum of its bit patterns times odd factors from Fibonacci hashing."""
    bits = jax.lax.bitcast_convert_type(w.astype(jnp.float32), jnp.uint32)
    bits ^= bits >> 16  # otherwise sign bits, in the top bit, would cancel modulo 2³²
    factors = (2 * jnp.arange(len(w), dtype=jnp.uint32) + 1) * jnp.uint32(2654435769)
    return jnp.sum(bits * factors[:, None], 0, dtype=jnp.uint32)
