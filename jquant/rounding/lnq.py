"""LNQ (GuidedQuant, arXiv 2505.07004, §4): levels of each column, in turns with its codes.

Each column w of a weight has 2^b levels c of its own (`ColumnCodebook`). With the codes as a matrix P of zeros and
ones, a row for each weight, the column is P c, and the change of the layer's output (w − P c)ᵀ H (w − P c).

1. k-means of each column gives the first levels; a weight counts by its entry on H's diagonal.
2. Another rounding chooses the first codes.
3. The levels with the least error for these codes, in closed form: (Pᵀ H P) c = Pᵀ H w.
4. New codes by coordinate descent (`CoordinateDescent`).

3 and 4 take turns. Neither raises a column's error.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, UInt8

from jquant.errors import InputError
from jquant.formats import ColumnCodebook
from jquant.formats.base import as_stored, ratio
from jquant.parts import brief, check_part, given
from jquant.qtensor import Grid
from jquant.rounding.base import Rounded, Rounding
from jquant.rounding.descent import descend
from jquant.rounding.gptq import GPTQ

DAMPING = 1e-5  # of Pᵀ H P, as a multiple of its diagonal's mean: float32's share of what its sums may lose


@dataclass(frozen=True)
class LNQ:
    """Learns the levels of `ColumnCodebook`, and rounds to them: see the module.

    Levels are kept in float16, and a column's only where its error falls.

    Attributes:
      start: the rounding that chooses the first codes.
      turns: of levels and codes; the levels come once more at the end.
      sweeps: over all rows in each turn.
      clusterings: steps of k-means.

    Raises:
      InputError: fewer than 1 of one of them.
    """

    start: Rounding = field(default_factory=GPTQ)
    turns: int = 4
    sweeps: int = 2
    clusterings: int = 20

    def __post_init__(self) -> None:
        check_part("LNQ's start", self.start, Rounding)
        for name in ("turns", "sweeps", "clusterings"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise InputError(f"LNQ's {name} is a whole number from 1, not {value!r}.")

    @property
    def needs(self) -> frozenset[str]:
        """See `Rounding`."""
        return self.start.needs | {"gram"}

    def __call__(self, w: Float[Array, "in out"], grid: Grid, gram: Float[Array, "in in"], **seen: Any) -> Rounded:
        """See `Rounding`; damping, attempts and fallback are those of `start`.

        Raises:
          InputError: the format is not `ColumnCodebook`.
        """
        _columns(grid)
        w = w.astype(jnp.float32)
        grid = replace(grid, levels=first_levels(w, grid, gram, self.clusterings))
        rounded = self.start(w, grid, **given(self.start, {"gram": gram, **seen}))
        grid = rounded.grid or grid

        def turn(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            codes, levels = fitted_levels(w, state[0], replace(grid, levels=state[1]), gram)
            sweep = lambda _, codes: descend(w, codes, replace(grid, levels=levels), gram)  # noqa: E731
            return jax.lax.fori_loop(0, self.sweeps, sweep, codes), levels

        codes, levels = jax.lax.fori_loop(0, self.turns, turn, (rounded.codes, grid.levels))
        codes, levels = fitted_levels(w, codes, replace(grid, levels=levels), gram)
        return replace(rounded, codes=codes, grid=replace(grid, levels=levels))


def _columns(grid: Grid) -> ColumnCodebook:
    if not isinstance(grid.format, ColumnCodebook):
        raise InputError(f"LNQ learns the levels of ColumnCodebook; {brief(grid.format)} has none.")
    return grid.format


def first_levels(
    w: Float[Array, "in out"], grid: Grid, gram: Float[Array, "in in"], clusterings: int
) -> Float[Array, "levels out"]:
    """Levels by k-means of each column, from the grid's; in units of the scale, in the grid's dtype.

    A weight counts by its entry on H's diagonal. A level to which no weight is nearest stays between its neighbours.
    """
    x, one, format = ratio(w, grid.per_weight[0]), jnp.ones((1, 1), jnp.float32), _columns(grid)
    importance = jnp.diagonal(gram)[:, None]

    def cluster(_: Array, levels: Array) -> Array:
        codes, new = format.encode(x, one, None, levels), []
        for code, level in enumerate(levels):
            share = jnp.where(codes == code, importance, 0)
            mass = jnp.sum(share, 0)
            new.append(jnp.where(mass > 0, jnp.sum(share * x, 0) / jnp.where(mass > 0, mass, 1), level))
        return jnp.stack(new)

    levels = jax.lax.fori_loop(0, clusterings, cluster, grid.levels.astype(jnp.float32))
    return levels.astype(grid.levels.dtype)


def fitted_levels(
    w: Float[Array, "in out"], codes: UInt8[Array, "in out"], grid: Grid, gram: Float[Array, "in in"]
) -> tuple[UInt8[Array, "in out"], Float[Array, "levels out"]]:
    """The levels with the least error for these codes, ascending, and the codes in their order.

    A column's levels stay if its error does not fall; so do levels that no code names. Pᵀ H P takes 2^b products with H
    of the weight's size.
    """
    scale = as_stored(grid.per_weight[0], grid.format.scale)
    x, one = ratio(w, grid.per_weight[0]), jnp.ones((1, 1), jnp.float32)
    old, count = grid.levels.astype(jnp.float32), len(grid.levels)
    product = lambda v: jnp.matmul(gram, v, precision="highest")  # noqa: E731
    summed = lambda v: jnp.stack([jnp.sum(jnp.where(codes == code, v, 0), 0) for code in range(count)])  # noqa: E731
    value = lambda levels: _columns(grid).decode(codes, one, None, levels)  # noqa: E731

    errors = x - value(old)
    pull = product(errors)
    shares = jax.lax.map(lambda code: summed(product((codes == code).astype(jnp.float32))), jnp.arange(count))
    new = (old + _solved(shares, summed(pull))).astype(grid.levels.dtype)
    new_errors = x - value(new.astype(jnp.float32))
    falls = jnp.sum(new_errors * product(new_errors), 0) < jnp.sum(errors * pull, 0)
    levels = jnp.where(falls & (jnp.broadcast_to(scale, w.shape)[0] != 0), new, grid.levels)
    order = jnp.argsort(levels, 0, stable=True)
    ranks = jnp.argsort(order, 0).astype(jnp.uint8)
    ordered = [jnp.where(codes == code, rank, 0).astype(jnp.uint8) for code, rank in enumerate(ranks)]
    return jnp.sum(jnp.stack(ordered), 0, dtype=jnp.uint8), jnp.take_along_axis(levels, order, 0)


def _solved(a: Float[Array, "levels levels out"], b: Float[Array, "levels out"]) -> Float[Array, "levels out"]:
    """(A + λ I)⁻¹ b of each column by Gauss and Jordan's elimination, with columns side by side.

    A is positive semidefinite, so no pivots are sought.
    """
    mean = jnp.mean(jnp.stack([a[i, i] for i in range(len(a))]), 0)
    damping = jnp.where(mean > 0, DAMPING * mean, 1)
    rows = jnp.concatenate([a + damping * jnp.eye(len(a), dtype=a.dtype)[..., None], b[:, None]], 1)

    def eliminate(i: Array, rows: Array) -> Array:
        pivot = rows[i] / rows[i, i]
        return (rows - rows[:, i, None] * pivot).at[i].set(pivot)

    return jax.lax.fori_loop(0, len(a), eliminate, rows)[:, -1]
