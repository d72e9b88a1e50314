"""Matrices that suit a method's format: small, yet with a short last group wherever the format has groups."""

import jax
import jax.numpy as jnp
import numpy as np

from jquant.formats import Additive, Codebook, Format, tile_of
from jquant.parts import given
from jquant.qtensor import Grid
from jquant.ranges import MinMax
from jquant.rounding import round_to_grid


def shape_for(format: Format) -> tuple[int, int]:
    """2.5 groups of rows, 1.5 where one scale spans many; both in eights, and `out` in as many parts as devices."""
    if isinstance(format, Additive):
        return 128, 64  # more vectors than a codebook has
    if isinstance(format.group, tuple):
        rows, columns = format.group
        return rows * 3 // 2, columns * 3 // 2
    if isinstance(format.group, str):
        return -(-72 // tile_of(format)[0]) * tile_of(format)[0], 16
    inner = format.scale
    if (
        isinstance(inner, Format)
        and isinstance(inner.group, int)
        and not (isinstance(inner, Codebook) and inner.centred)
    ):
        return format.group * inner.group * 3 // 2, 16  # a super-block and half of another
    return format.group * 5 // 2, 16


def problem(shape: tuple[int, int], seed: int = 0, dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    """A weight, the Gram matrix of correlated inputs of uneven magnitude, and their mean |x|."""
    rng, (rows, out) = np.random.default_rng(seed), shape
    x = rng.standard_normal((4 * rows, rows)) @ (np.eye(rows) + 0.1 * rng.standard_normal((rows, rows)))
    x *= rng.uniform(0.3, 3, rows)
    w = jnp.asarray(0.05 * rng.standard_normal((rows, out)), dtype)
    return w, jnp.asarray(x.T @ x / len(x), jnp.float32), jnp.asarray(np.abs(x).mean(0), jnp.float32)


def rounded(rounding, w, format: Format, gram=None, held_out=None, range=MinMax(), grid=None):  # noqa: B008
    """A weight rounded on the grid of a range, as the pipeline does it, and what was done."""
    seen = {name: value for name, value in (("gram", gram), ("held_out", held_out)) if value is not None}
    grid = range(w, format, **given(range, seen)) if grid is None else grid
    return round_to_grid(w, Grid.of(*grid, format, w.shape), rounding, seen)[:2]
