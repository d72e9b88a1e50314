"""The two grid values around a weight, for roundings that choose between them."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, UInt8

from jquant.errors import InputError
from jquant.formats import tile_of
from jquant.qtensor import Grid


def neighbours(w: Float[Array, "*l in out"], grid: Grid) -> tuple[UInt8[Array, "*l in out"], UInt8[Array, "*l in out"]]:
    """Codes of the largest value ≤ w and of the smallest value ≥ w; for weights beyond the grid, the end's code twice.

    It decodes all 2^bits codes, so it works for every format, also with signed scales and descending codes. The ends
    are the codes of infinitely large weights; codes beyond them (an FP8 NaN, the lowest code without `full_range`) are
    left out.

    Args:
      w: the weights.
      grid: the codes' values.

    Raises:
      InputError: the format codes several weights together.
    """
    if tile_of(grid.format) != (1, 1):
        raise InputError(f"{type(grid.format).__name__} codes several weights together: round by Nearest or GPTQ.")
    w, largest = w.astype(jnp.float32), float(jnp.finfo(jnp.float32).max)
    ends = [grid.encode(jnp.full_like(w, end), grid.per_weight) for end in (-largest, largest)]
    low, high = (grid.decode(end) for end in ends)
    w = jnp.clip(w, low, high)

    def consider(code: Array, best: tuple[Array, ...]) -> tuple[Array, ...]:
        below, above, low, high = best
        code = code.astype(jnp.uint8)
        value = grid.decode(code)
        nearer_below, nearer_above = (value <= w) & (value > low), (value >= w) & (value < high)
        return (
            jnp.where(nearer_below, code, below),
            jnp.where(nearer_above, code, above),
            jnp.where(nearer_below, value, low),
            jnp.where(nearer_above, value, high),
        )

    below, above, _, _ = jax.lax.fori_loop(0, 2**grid.format.bits, consider, (*ends, low, high))
    return below, above
