"""Refits scales, and float zeros, to fixed codes."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.errors import InputError
from jquant.formats import block_shape, expand, unpack
from jquant.formats.base import as_argument
from jquant.parts import check_part, given
from jquant.qtensor import Grid, QTensor, dequantize, is_integer, stored_grid
from jquant.rounding.base import NOISE, Rounded, Rounding
from jquant.rounding.gptq import GPTQ


@dataclass(frozen=True)
class Refit:
    """Rounds with another rounding, then fits each group's scale to its codes.

    With fixed codes, ŵ = s q + z in a group with scale s and float zero z; q are the codes' values under a scale of 1
    (with integer zeros, which stay). As a function of one group's scale, trace((W − Ŵ)ᵀ H (W − Ŵ)) is least at

        s_g + (eᵀ H_{·g} q_g) / (q_gᵀ H_gg q_g),  e = w − ŵ,

    and likewise for scale and zero together. The groups take that step in turn, each column separately: coordinate
    descent with exact steps. The new scale is rounded to its stored dtype, and kept only if the error falls. Columns
    that share a scale, in blocks or under "tensor", sum both terms. H is not damped.

    Quantized scales (k-quants, double quantization, NVFP4) are not refitted; powers of two (MX) move where another
    power is better.

    Attributes:
      start: the rounding that chooses the codes.
      passes: over all groups.

    Raises:
      InputError: fewer than 1 pass.
    """

    start: Rounding = field(default_factory=GPTQ)
    passes: int = 2

    def __post_init__(self) -> None:
        check_part("Refit's start", self.start, Rounding)
        if self.passes < 1:
            raise InputError(f"Refit takes at least 1 pass, not {self.passes}.")

    @property
    def needs(self) -> frozenset[str]:
        """See `Rounding`."""
        return self.start.needs | {"gram"}

    def __call__(self, w: Float[Array, "in out"], grid: Grid, gram: Float[Array, "in in"], **seen: Any) -> Rounded:
        """See `Rounding`; damping, attempts and fallback are those of `start`."""
        rounded = self.start(w, grid, **given(self.start, {"gram": gram, **seen}))
        if not isinstance(grid.format.scale, str):
            return rounded
        q = _refit(w.astype(jnp.float32), (rounded.grid or grid).pack(rounded.codes), gram, self.passes)
        return replace(rounded, grid=Grid.of(*stored_grid(q), q.format, q.shape, q.levels))


def _refit(w: Float[Array, "in out"], q: QTensor, gram: Float[Array, "in in"], passes: int) -> QTensor:
    """The same codes with refitted scales and float zeros."""
    (n, out), (rows, columns), dtype = w.shape, block_shape(q.format, q.shape), str(q.format.scale)
    pad = -n % rows
    scale, zero = stored_grid(q)
    # A zero that is not free has the direction 0, so it never moves.
    free = None if is_integer(zero) else zero
    inside = jax.tree.map(lambda v: expand(v, (rows, columns), w.shape), zero if free is None else jnp.zeros((1, 1)))
    table = as_argument(q.levels)
    basis = q.format.decode(unpack(q.codes, q.format.bits, n), jnp.ones((1, 1)), inside, *table)

    def tiles(v: Array) -> Array:
        return jnp.pad(v, ((0, pad), (0, 0))).reshape(-1, rows, v.shape[1])

    def per_block(v: Array) -> Array:
        wide = jnp.pad(jnp.broadcast_to(v, (rows, out)), ((0, 0), (0, -out % columns)))
        return jnp.sum(wide.reshape(rows, -1, columns), (0, 2))

    def step(errors: Array, group: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        index, lines, s, z, w, *grid = group
        gram_block = jax.lax.dynamic_slice_in_dim(lines, index * rows, rows, 1)
        pull = jnp.matmul(lines, errors.reshape(-1, out), precision="highest")
        bent, tilted = (jnp.matmul(gram_block, v, precision="highest") for v in (s, z))
        size = jnp.diagonal(gram_block)[:, None]
        terms = (s * pull, z * pull, s * bent, z * bent, z * tilted, size * s**2, size * z**2)
        grid = _descend(tuple(grid), tuple(map(per_block, terms)), dtype)
        at_s, at_z = (expand(v[None], (1, columns), (1, out)) for v in grid)
        return errors.at[index].set(w - (s * at_s + z * at_z)), grid

    direction = tiles(jnp.full((n, 1), float(free is not None), jnp.float32))
    groups = (tiles(jnp.pad(gram, ((0, 0), (0, pad)))), tiles(basis), direction, tiles(w))
    indices = jnp.arange(len(direction))

    def one_pass(_, state):
        errors, grid = state
        return jax.lax.scan(step, errors, (indices, *groups, *grid))

    wide = scale.astype(jnp.float32)
    start = tiles(w - dequantize(q)), (wide, jnp.zeros_like(wide) if free is None else free.astype(jnp.float32))
    _, (new_scale, new_zero) = jax.lax.fori_loop(0, passes, one_pass, start)
    return replace(q, scale=new_scale.astype(dtype), zero=q.zero if free is None else new_zero.astype(dtype))


def _descend(grid: tuple[Array, ...], terms: tuple[Array, ...], dtype: str) -> tuple[Array, Array]:
    """The best scale and zero of each block, as stored; the old ones if the error does not fall (all `[columns]`).

    With (σ, ζ) the change of scale and zero, the error falls by 2 σ pull_s + 2 ζ pull_z − σ² ss − 2 σ ζ sz − ζ² zz.
    The sizes are Σ Hᵢᵢ sᵢ² and Σ Hᵢᵢ zᵢ²; curvatures far below them are rounding error.
    """
    (scale, zero), (pull_s, pull_z, ss, sz, zz, size_s, size_z) = grid, terms

    def quotient(a: Array, b: Array, size: Array) -> Array:
        real = b > NOISE * size
        return jnp.where(real, a / jnp.where(real, b, 1), 0)

    stored = lambda v: v.astype(dtype).astype(jnp.float32)  # noqa: E731
    # The zero is eliminated first, then fitted to the stored scale.
    share = quotient(sz, zz, size_z)
    new_scale = stored(scale + quotient(pull_s - share * pull_z, ss - share * sz, size_s))
    change = new_scale - scale
    new_zero = jnp.where(zz > 0, stored(zero + quotient(pull_z - change * sz, zz, size_z)), zero)
    shift = new_zero - zero
    gain = 2 * (change * pull_s + shift * pull_z)
    loss = (change**2 * ss, 2 * change * shift * sz, shift**2 * zz)
    better = gain - sum(loss) > NOISE * sum(map(jnp.abs, loss))
    return jnp.where(better, new_scale, scale), jnp.where(better, new_zero, zero)
