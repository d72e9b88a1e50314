"""A range found by search."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.errors import InputError
from jquant.formats import Block, Format, expand, grouped, tile_of
from jquant.ranges.base import ends, split
from jquant.stats import check_gram


@dataclass(frozen=True)
class Search:
    """The min-max range of each group, clipped to the least error.

    First both ends shrink by a common factor. If the format has a zero, the ends are independent: the upper end is then
    searched alone, and after it the lower end.

    Attributes:
      metric: the error that is minimised, for Δ = Q(w) − w within a group:
        "mse" Σ Δ²;
        "diagonal" Σ Hᵢᵢ Δᵢ² with H the Gram matrix;
        "gram" Δᵀ H_gg Δ with the group's block of H: the change of the layer's output if the other groups are exact
        (AWQ's clipping objective, arXiv 2306.00978 §3.2, with H in place of stored samples).
      steps: factors tried, evenly spaced from 1 down to `smallest`.
      smallest: the strongest clipping tried.

    Raises:
      InputError: `metric` needs statistics and there are none.
    """

    metric: Literal["mse", "diagonal", "gram"] = "mse"
    steps: int = 21
    smallest: float = 0.6

    def __post_init__(self) -> None:
        if self.metric not in ("mse", "diagonal", "gram"):
            raise InputError(f'Search takes metric="mse", "diagonal" or "gram", not {self.metric!r}.')
        if self.steps < 1 or not 0 < self.smallest <= 1:
            raise InputError(f"Search takes at least 1 step and a factor in (0, 1], not {self.steps}, {self.smallest}.")

    @property
    def needs(self) -> frozenset[str]:
        """See `Range`."""
        return frozenset() if self.metric == "mse" else frozenset({"gram"})

    def __call__(
        self, w: Float[Array, "in out"], format: Format, gram: Float[Array, "in in"] | None = None
    ) -> tuple[Array, Array | None]:
        """See `Range`."""
        if gram is None and self.needs:
            raise InputError(f"The range search by {self.metric} needs a Gram matrix, so calibration text.")
        check_gram(gram, w)
        w = w.astype(jnp.float32)
        groups, real, block = split(w, format)
        low, high = ends(groups)
        weigh = _metric(self.metric, block, gram)

        def attempt(low: Array, high: Array):
            grid = format.grid(low, high)
            if tile_of(format) == (1, 1):
                at = jax.tree.map(lambda v: v[:, None], grid)
                # A codebook without a level at 0 would count a short group's padding as error.
                delta = (format.decode(format.encode(groups, *at), *at) - groups) * real
            else:
                at = jax.tree.map(lambda v: expand(v, block, w.shape), grid)
                delta = grouped(format.decode(format.encode(w, *at), *at) - w, block)
            return weigh(delta), (low, high), grid

        def sweep(best, move_low: bool, move_high: bool):
            _, (kept_low, kept_high), _ = best

            def step(best, shrink: Array):
                candidate = attempt(low * shrink if move_low else kept_low, high * shrink if move_high else kept_high)
                better = candidate[0] < best[0]
                return jax.tree.map(lambda a, b: jnp.where(better, a, b), candidate, best), None

            # A scan holds one candidate at a time: memory does not grow with `steps`.
            return jax.lax.scan(step, best, jnp.linspace(1.0, self.smallest, self.steps, dtype=jnp.float32))[0]

        best = sweep(attempt(low, high), True, True)
        if format.has_zero:
            best = sweep(sweep(best, False, True), True, False)
        return best[2]


def _metric(metric: str, block: Block, gram: Array | None) -> Callable[[Array], Array]:
    """The error of each block, `[groups, columns]`, as a function of its members' Δ `[groups, members, columns]`."""
    rows, columns = block
    if metric == "mse":
        return lambda delta: _weighted_sum(jnp.ones((1, delta.shape[1], 1)), delta**2)
    assert gram is not None
    if metric == "diagonal":
        weight = jnp.repeat(grouped(jnp.diagonal(gram)[:, None], (rows, 1)), columns, -2)
        return lambda delta: _weighted_sum(weight, delta**2)
    groups = -(-gram.shape[0] // rows)
    pad = groups * rows - gram.shape[0]
    tiles = jnp.pad(gram, ((0, pad), (0, pad))).reshape(groups, rows, groups, rows)
    tiles = tiles[jnp.arange(groups), :, jnp.arange(groups), :]

    def energy(delta: Array) -> Array:
        delta = delta.reshape(groups, rows, -1)  # the columns of a block side by side
        products = delta * jnp.einsum("gij,gjo->gio", tiles, delta, precision="highest")
        return jnp.sum(_weighted_sum(jnp.ones((1, rows, 1)), products).reshape(groups, columns, -1), -2)

    return energy


def _weighted_sum(weight: Float[Array, "_ members 1"], values: Array) -> Array:
    """Sums over the members of each group, as a matrix product: half the time of XLA's sum on a CPU."""
    weight = jnp.broadcast_to(weight, (*values.shape[:-1], 1))
    return jnp.matmul(weight.mT, values, precision="highest")[:, 0]
