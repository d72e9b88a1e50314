"""AQLM (arXiv 2401.06118): a weight's own codebooks, in turns with the codes of its vectors.

A vector of g weights along `in` is ŵ = s Σₘ Cₘ[bₘ] (`Additive`). Codebooks and codes shall make the change of the
layer's outputs small, trace((W − Ŵ)ᵀ H (W − Ŵ)) with the Gram matrix H (Eq. 2):

1. Residual k-means gives the first codebooks: each is fitted to what those before it leave (§3.2, initialisation).
2. Another rounding chooses the first codes.
3. The codebooks with the least error for these codes (phase 2). The paper takes steps of Adam. The error is quadratic
   in the codebooks, so these are conjugate gradients here.
4. New codes, vector by vector, while all others stay (phase 1). As a function of the rows k of a column, the error is
   (ŵ − t)ᵀ H_kk (ŵ − t) and a constant, t being the best real values (`CoordinateDescent`). A beam search replaces one
   code after the other: of all replacements of bₘ in all sums of the beam, the best sums are the next beam.

3 and 4 take turns. Neither raises the error.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int32, UInt8

from jquant.errors import InputError
from jquant.formats.base import as_stored, ratio
from jquant.formats.vectors import Additive, first_true, nearest_vector, summed, tiled, vectors
from jquant.parts import brief, check_part, given
from jquant.qtensor import Grid
from jquant.rounding.base import Rounded, Rounding
from jquant.rounding.descent import Rows, descend
from jquant.rounding.info import output_energy
from jquant.rounding.nearest import Nearest

# The most sums that a beam search compares at a time: 16 MB of float32.
SUMS = 1 << 22
# Conjugate gradients end where the slope's square is this share of the first: float32's rounding errors come next.
CONVERGED = 1e-10


@dataclass(frozen=True)
class AQLM:
    """Learns the codebooks of `Additive`, and rounds to them: see the module.

    Codebooks are kept in float16, and only where the error falls.

    Attributes:
      start: the rounding that chooses the first codes. After k-means they suit its codebooks as they are: from `GPTQ`
        the turns ended at a 7 % larger error (normal weights of 576 × 576, 2 bits).
      turns: of codebooks and codes; the codebooks come once more at the end.
      beam: sums that the search goes on with. With as many as there are, the best codes of a vector are found.
      clusterings: of each codebook, in residual k-means.
      steps: of conjugate gradients; each takes one product with H.

    Raises:
      InputError: fewer than 1 of one of them.
    """

    start: Rounding = field(default_factory=Nearest)
    turns: int = 4
    beam: int = 4
    clusterings: int = 10
    steps: int = 16

    def __post_init__(self) -> None:
        check_part("AQLM's start", self.start, Rounding)
        for name in ("turns", "beam", "clusterings", "steps"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise InputError(f"AQLM's {name} is a whole number from 1, not {value!r}.")

    @property
    def needs(self) -> frozenset[str]:
        """See `Rounding`."""
        return self.start.needs | {"gram"}

    def __call__(self, w: Float[Array, "in out"], grid: Grid, gram: Float[Array, "in in"], **seen: Any) -> Rounded:
        """See `Rounding`; damping, attempts and fallback are those of `start`.

        Raises:
          InputError: the format is not `Additive`.
        """
        _additive(grid)
        w = w.astype(jnp.float32)
        first = first_codebooks(w, grid, gram, self.clusterings)
        grid = replace(grid, levels=first.astype(jnp.float16))
        rounded = self.start(w, grid, **given(self.start, {"gram": gram, **seen}))
        grid = rounded.grid or grid

        def turn(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            codes, levels = state
            fitted = replace(grid, levels=fitted_codebooks(w, codes, replace(grid, levels=levels), gram, self.steps))
            return descend(
                w, codes, fitted, gram, propose=partial(searched, grid=fitted, beam=self.beam)
            ), fitted.levels

        codes, levels = jax.lax.fori_loop(0, self.turns, turn, (rounded.codes, grid.levels))
        levels = fitted_codebooks(w, codes, replace(grid, levels=levels), gram, self.steps)
        return replace(rounded, codes=codes, grid=replace(grid, levels=levels))


def _additive(grid: Grid) -> Additive:
    if not isinstance(grid.format, Additive):
        raise InputError(f"AQLM learns the codebooks of Additive; {brief(grid.format)} has none.")
    return grid.format


def _scale(grid: Grid) -> Float[Array, "..."]:
    return as_stored(grid.per_weight[0], grid.format.scale)


def first_codebooks(
    w: Float[Array, "in out"], grid: Grid, gram: Float[Array, "in in"], clusterings: int
) -> Float[Array, "codebooks levels dim"]:
    """Codebooks by residual k-means: each is fitted to what those before it leave, over their scales.

    A vector counts by its scale's square times the mean of H's diagonal over its rows. Each codebook begins at vectors
    spread evenly over the weight. Those to which no vector is nearest take the ones that err most.
    """
    format, scale = _additive(grid), jnp.broadcast_to(_scale(grid), w.shape)
    count, dim = 2**format.index_bits, format.dim
    rest = tiled(ratio(w, scale), dim)
    importance = jnp.mean(tiled(scale**2 * jnp.diagonal(gram)[:, None], dim), -2)
    tiles, out = importance.shape
    places = _spread(count * format.codebooks, tiles * out).reshape(format.codebooks, count)
    tables = []
    for at in places:
        each = jnp.moveaxis(rest, -1, -2)

        def cluster(_: Array, table: Array, rest: Array = rest, each: Array = each) -> Array:
            nearest = nearest_vector(rest, table)
            mass = jnp.zeros(count, jnp.float32).at[nearest].add(importance)[:, None]
            sums = jnp.zeros((count, dim), jnp.float32).at[nearest].add(each * importance[..., None])
            lost = importance * jnp.sum((rest - vectors(table, nearest)) ** 2, -2)
            worst = jax.lax.top_k(lost.reshape(-1), min(count, lost.size))[1]
            idle = mass[:, 0] == 0
            taken = worst[jnp.minimum(jnp.cumsum(idle) - 1, len(worst) - 1)]
            return jnp.where(idle[:, None], each[taken // out, taken % out], sums / jnp.where(mass > 0, mass, 1))

        table = jax.lax.fori_loop(0, clusterings, cluster, each[at // out, at % out])
        rest = rest - vectors(table, nearest_vector(rest, table))
        tables.append(table)
    return jnp.stack(tables)


def _spread(count: int, total: int) -> np.ndarray:
    """`count` numbers below `total`, evenly spread, and none twice where they are enough."""
    step = max(1, round(0.618 * total))
    while math.gcd(step, total) > 1:
        step += 1
    return np.arange(count, dtype=np.int64) * step % total


def fitted_codebooks(
    w: Float[Array, "in out"],
    codes: UInt8[Array, "in out"],
    grid: Grid,
    gram: Float[Array, "in in"],
    steps: int,
) -> Float[Array, "codebooks levels dim"]:
    """The codebooks with the least error for these codes, float16; the given ones if the error does not fall.

    Conjugate gradients on the normal equations, each entry's in units of its curvature. They start at the given
    codebooks and stop after some steps. Entries that no code names stay.
    """
    scale = jnp.broadcast_to(_scale(grid), w.shape)
    format, start = _additive(grid), grid.levels.astype(jnp.float32)
    indices = format.indices_of(codes)

    def values(tables: Array) -> Array:
        return summed(tables, indices).reshape(w.shape) * scale

    def gathered(slopes: Array) -> Array:
        of_tiles = jnp.moveaxis(tiled(slopes, format.dim), -1, -2)
        return jnp.stack([jnp.zeros(start.shape[1:], jnp.float32).at[index].add(of_tiles) for index in indices])

    def curved(tables: Array) -> Array:
        return gathered(scale * jnp.matmul(gram, values(tables), precision="highest"))

    curvature = gathered(scale**2 * jnp.diagonal(gram)[:, None])
    inverse = jnp.where(curvature > 0, 1 / jnp.where(curvature > 0, curvature, 1), 0)

    def step(_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        moved, slope, direction, size = state
        bent = curved(direction)
        curve = jnp.sum(direction * bent)
        live = (curve > 0) & (size > CONVERGED * first)
        length = jnp.where(live, size / jnp.where(live, curve, 1), 0)
        new_slope = slope - length * bent
        new_size = jnp.sum(new_slope * inverse * new_slope)
        new_direction = inverse * new_slope + new_size / jnp.where(live, size, 1) * direction
        return (moved + length * direction, new_slope, jnp.where(live, new_direction, direction), new_size)

    errors = w - values(start)
    slope = gathered(scale * jnp.matmul(gram, errors, precision="highest"))
    first = jnp.sum(slope * inverse * slope)
    state = (jnp.zeros_like(start), slope, inverse * slope, first)
    new = (start + jax.lax.fori_loop(0, steps, step, state)[0]).astype(grid.levels.dtype)
    new_errors = w - values(new.astype(jnp.float32))
    return jnp.where(output_energy(new_errors, gram) < output_energy(errors, gram), new, grid.levels)


def searched(rows: Rows, grid: Grid, beam: int) -> UInt8[Array, "dim out"]:
    """The codes of one tile of every column by beam search, from its present codes.

    The distance (v − t)ᵀ H_kk (v − t) is that of Lᵀ v and Lᵀ t with H_kk = L Lᵀ, for all columns.
    """
    format = _additive(grid)
    root = jnp.linalg.cholesky(rows.corner)
    turned = partial(jnp.matmul, precision="highest")
    tables = turned(grid.levels.astype(jnp.float32), root)
    target = turned(root.T, ratio(rows.target, as_stored(rows.at[0], format.scale)))
    indices = format.indices_of(rows.codes)  # [codebooks, sums, out]; at first the one sum that there is
    rest = target - summed(tables, indices)  # [sums, dim, out]
    for m, table in enumerate(tables):
        rest = rest + vectors(table, indices[m])
        chosen = _best(rest, table, beam)
        of, index = chosen // len(table), chosen % len(table)
        indices = jnp.take_along_axis(indices, of[None], 1).at[m].set(index)
        rest = jnp.take_along_axis(rest, of[:, None], 0) - vectors(table, index)
    return format.codes_of(indices[:, :1]).reshape(rows.codes.shape)


def _best(rest: Float[Array, "sums dim out"], table: Float[Array, "levels dim"], beam: int) -> Int32[Array, "beam out"]:
    """The replacements with the least ‖rest − v‖², the best first: sum · levels + the vector's code.

    Of fewer sums than the beam takes, all. Some vectors at a time.
    """
    (sums, _, out), (count, dim) = rest.shape, table.shape
    part = count
    while part > 16 and sums * part * out > SUMS:
        part //= 2
    beam = min(beam, sums * count)
    length = jnp.sum(rest**2, 1)
    number = jnp.arange(sums, dtype=jnp.int32)[:, None] * count

    def compare(best: tuple[Array, Array], some: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        start, part_of = some
        products = jnp.einsum("cd,sdo->sco", part_of, rest, precision="highest")
        costs = length[:, None] - 2 * products + jnp.sum(part_of**2, 1)[:, None]
        places = (number + start + jnp.arange(part, dtype=jnp.int32)).reshape(-1, 1)
        places = jnp.broadcast_to(places, (sums * part, out))
        costs = jnp.concatenate([best[0], costs.reshape(-1, out)])
        return _least(costs, jnp.concatenate([best[1], places]), beam), None

    blank = jnp.full((beam, out), jnp.inf, jnp.float32), jnp.zeros((beam, out), jnp.int32)
    starts = jnp.arange(0, count, part, dtype=jnp.int32)
    return jax.lax.scan(compare, blank, (starts, table.reshape(-1, part, dim)))[0][1]


def _least(
    costs: Float[Array, "n out"], places: Int32[Array, "n out"], beam: int
) -> tuple[Float[Array, "beam out"], Int32[Array, "beam out"]]:
    """The least costs of each column in their order, and their places."""
    row = jnp.arange(len(costs), dtype=jnp.int32)[:, None]

    def take(costs: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        least = jnp.min(costs, 0)
        here = row == first_true(costs == least)
        return jnp.where(here, jnp.inf, costs), (least, jnp.sum(jnp.where(here, places, 0), 0, dtype=jnp.int32))

    return jax.lax.scan(take, costs, None, length=beam)[1]
