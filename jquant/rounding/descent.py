"""Coordinate descent on the layer's output error, after another rounding."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, UInt8

from jquant.errors import InputError
from jquant.formats import tile_of
from jquant.parts import check_part, given
from jquant.qtensor import Grid
from jquant.rounding.base import NOISE, Rounded, Rounding
from jquant.rounding.gptq import GPTQ


@dataclass(frozen=True)
class CoordinateDescent:
    """Rounds with another rounding, then rounds the rows again, one after the other, while all others stay.

    With R = H (W − Ŵ), the best real values of the rows k, if the others stay, are Ŵ_k + H_kk⁻¹ R_k. They are rounded
    to nearest, and the new values Ŵ_k + D are kept where trace((W − Ŵ)ᵀ H (W − Ŵ)) falls, which it does by
    2 tr(Dᵀ R_k) − tr(Dᵀ H_kk D) (QuIP#, arXiv 2402.04396, §4; CDQuant, arXiv 2406.17542). For single weights k is one
    row, each column decides for itself, and the nearest code is the best one. A format that codes several weights
    together has the rows of a tile at once. H is not damped, so more sweeps fit the calibration text more closely.

    Attributes:
      start: the rounding before.
      sweeps: over all rows.
      block: rows whose R is computed by one matrix product (2 n² out operations a sweep). Any value gives the same
        codes up to float rounding.

    Raises:
      InputError: fewer than 1 sweep, or row in a block.
    """

    start: Rounding = field(default_factory=GPTQ)
    sweeps: int = 2
    block: int = 32

    def __post_init__(self) -> None:
        check_part("CoordinateDescent's start", self.start, Rounding)
        if self.sweeps < 1 or self.block < 1:
            raise InputError(
                f"CoordinateDescent takes at least 1 sweep and 1 row a block, not {self.sweeps} and {self.block}."
            )

    @property
    def needs(self) -> frozenset[str]:
        """See `Rounding`."""
        return self.start.needs | {"gram"}

    def __call__(self, w: Float[Array, "in out"], grid: Grid, gram: Float[Array, "in in"], **seen: Any) -> Rounded:
        """See `Rounding`; damping, attempts and fallback are those of `start`."""
        rounded = self.start(w, grid, **given(self.start, {"gram": gram, **seen}))
        w, at_grid = w.astype(jnp.float32), rounded.grid or grid
        sweep = lambda _, codes: descend(w, codes, at_grid, gram, self.block)  # noqa: E731
        return replace(rounded, codes=jax.lax.fori_loop(0, self.sweeps, sweep, rounded.codes))


class Rows(NamedTuple):
    """A tile's rows, as new codes for them are sought.

    Attributes:
      target: their best real values, if the other rows stay.
      codes: the present ones.
      corner: their block of H, damped (`damped`).
      at: their scales and zeros.
    """

    target: Float[Array, "tile out"]
    codes: UInt8[Array, "tile out"]
    corner: Float[Array, "tile tile"]
    at: Any


def descend(
    w: Float[Array, "in out"],
    codes: UInt8[Array, "in out"],
    grid: Grid,
    gram: Float[Array, "in in"],
    block: int = 32,
    propose: Callable[[Rows], UInt8[Array, "tile out"]] | None = None,
) -> UInt8[Array, "in out"]:
    """The codes after one sweep (`CoordinateDescent`); no column's error rises.

    Args:
      w: the weight, float32.
      codes: the present ones.
      grid: their values.
      gram: H.
      block: rows whose R is computed at a time.
      propose: the rows' new codes; by default those of the values nearest to the target.
    """
    tile, columns = tile_of(grid.format)
    n, block = len(w), -(-block // tile) * tile
    pad = -n % block
    fill = lambda v, mode: jnp.pad(jnp.broadcast_to(v, w.shape), ((0, pad), (0, 0)), mode)  # noqa: E731
    at = jax.tree.map(lambda v: fill(v, "edge"), grid.per_weight)  # not 0: some scale dtypes lack it
    w, codes = fill(w, "constant"), fill(codes, "constant")
    gram = jnp.pad(gram, ((0, pad), (0, pad)))  # padding rows change no others
    product = lambda a, b: jnp.matmul(a, b, precision="highest")  # noqa: E731
    propose = propose or (lambda rows: grid.encode(rows.target, rows.at))

    def of_block(state: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        errors, codes = state  # errors: W − Ŵ
        cut = lambda v, axis=0: jax.lax.dynamic_slice_in_dim(v, start, block, axis)  # noqa: E731
        lines = cut(gram)
        within, at_block = cut(lines, 1), jax.tree.map(cut, at)

        def of_tile(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            pull, errors, codes = state
            own = lambda v, axis=0: jax.lax.dynamic_slice_in_dim(v, i * tile, tile, axis)  # noqa: E731
            put = lambda v, part: jax.lax.dynamic_update_slice_in_dim(v, part, i * tile, 0)  # noqa: E731
            line = own(within, 1)
            corner, own_pull, own_at = own(line), own(pull), jax.tree.map(own, at_block)
            value = own(weights) - own(errors)
            new = propose(Rows(value + _solve(corner, own_pull), own(codes), damped(corner), own_at))
            moved = grid.decode(new, own_at) - value
            bent = moved * product(corner, moved)
            gain = jnp.sum(2 * moved * own_pull - bent, 0).reshape(-1, columns).sum(1)
            size = jnp.sum(jnp.abs(moved * own_pull) + jnp.abs(bent), 0).reshape(-1, columns).sum(1)
            taken = jnp.repeat(gain > NOISE * size, columns)
            moved = jnp.where(taken, moved, 0)
            codes = put(codes, jnp.where(taken, new, own(codes)))
            return pull - product(line, moved), put(errors, own(errors) - moved), codes

        weights = cut(w)
        start_state = product(lines, errors), cut(errors), cut(codes)
        _, lost, new_codes = jax.lax.fori_loop(0, block // tile, of_tile, start_state)
        put = lambda v, part: jax.lax.dynamic_update_slice_in_dim(v, part, start, 0)  # noqa: E731
        return (put(errors, lost), put(codes, new_codes)), None

    first = (w - grid.decode(codes, at)).at[n:].set(0)
    return jax.lax.scan(of_block, (first, codes), jnp.arange(0, n + pad, block))[0][1][:n]


def damped(corner: Float[Array, "tile tile"]) -> Float[Array, "tile tile"]:
    """H_kk with 1e-4 of its diagonal's mean on the diagonal, as it may be singular; 1 if it is all 0."""
    mean = jnp.mean(jnp.diagonal(corner))
    return corner + jnp.where(mean > 0, 1e-4 * mean, 1) * jnp.eye(len(corner), dtype=corner.dtype)


def _solve(corner: Float[Array, "tile tile"], pull: Float[Array, "tile out"]) -> Float[Array, "tile out"]:
    """H_kk⁻¹ R_k; 0 for inputs that were never active. A corner of several rows is damped."""
    size = jnp.diagonal(corner)
    live = size > 0
    if len(corner) == 1:
        return jnp.where(live[:, None], pull / jnp.where(live, size, 1)[:, None], 0)
    return jnp.where(live[:, None], jnp.linalg.solve(damped(corner), pull), 0)
