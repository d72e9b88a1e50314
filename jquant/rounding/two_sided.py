"""Rounding that makes up for errors on both sides of a weight: among its inputs, and among its outputs."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.errors import InputError
from jquant.formats import tile_of
from jquant.formats.base import has_column_levels
from jquant.parts import check_part, given
from jquant.qtensor import Grid
from jquant.rounding.base import Rounded, Rounding
from jquant.rounding.gptq import GPTQ, factorize


@dataclass(frozen=True)
class TwoSided:
    """Rounds columns after columns with another rounding, each to a target that makes up for the errors before it.

    The loss grows by ½ tr(Hₒ Δᵀ H Δ) with the error Δ = W − Ŵ if its Hessian is the Kronecker product of H, over the
    inputs, and Hₒ, over the outputs (YAQA, arXiv 2505.22988). GPTQ minimises it for Hₒ = 1. With Hₒ = Rᵀ R,
    R upper triangular, the last columns b come first and the target of each next ones is, as in block LDLQ,

        t_b = w_b + Σₖ Δₖ (R_bb⁻¹ R_bk)ᵀ,  k after b,

    which `start` rounds under H. Columns with the largest Hₒ come first. With `LossGradient(labels="drawn")` the two
    matrices are one step of the paper's power iteration, from the identity, for its sketch A.

    Attributes:
      start: rounds each group of columns; it must keep the grid.
      columns: rounded together, without making up for one another; of a format's tiles a multiple, and of a weight's
        outputs the next smaller divisor.
      damping: added to Hₒ's diagonal, as a multiple of its mean; raised as `GPTQ` does.

    Raises:
      InputError: fewer than 1 column; a negative damping.
    """

    start: Rounding = field(default_factory=GPTQ)
    columns: int = 64
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_part("TwoSided's start", self.start, Rounding)
        if isinstance(self.columns, bool) or not isinstance(self.columns, int) or self.columns < 1:
            raise InputError(f"TwoSided takes at least 1 column at a time, not {self.columns!r}.")
        if not self.damping >= 0:
            raise InputError(f"TwoSided takes a damping of at least 0, not {self.damping!r}.")

    @property
    def needs(self) -> frozenset[str]:
        """See `Rounding`."""
        return self.start.needs | {"gram", "output_gram"}

    def __call__(
        self, w: Float[Array, "in out"], grid: Grid, output_gram: Float[Array, "out out"], **seen: Any
    ) -> Rounded:
        """See `Rounding`; damping, attempts and fallback are the largest of `start`'s.

        "output_gram" is the mean of g gᵀ over tokens, g the loss's gradient at the weight's outputs, `[out, out]`.
        """
        w, out = w.astype(jnp.float32), w.shape[1]
        size = self._size(out, tile_of(grid.format)[1])
        unit, order, _, unsolved, _ = factorize(output_gram, self.damping, size)
        starts = order.reshape(-1, size)[:, 0]  # columns of a group are adjacent, in their order
        at = jax.tree.map(lambda v: jnp.broadcast_to(v, w.shape), (grid.per_weight, grid.nearest))

        def of_group(state: tuple[Array, Array], place: Array) -> tuple[tuple[Array, Array], Rounded]:
            errors, codes = state  # errors in the order of `order`
            first = starts[place]
            cut = lambda v: jax.lax.dynamic_slice_in_dim(v, first, size, 1)  # noqa: E731
            debts = jax.lax.dynamic_slice_in_dim(unit, place * size, size, 0)
            per_weight, nearest = jax.tree.map(cut, at)
            levels = cut(grid.levels) if has_column_levels(grid.format) else grid.levels
            own = replace(grid, per_weight=per_weight, nearest=nearest, levels=levels)
            target = cut(w) + jnp.matmul(errors, debts.T, precision="highest")
            rounded = self.start(target, own, **given(self.start, seen))
            if rounded.grid is not None:
                raise InputError(f"TwoSided's start must keep the grid, which {type(self.start).__name__} changes.")
            lost = cut(w) - own.decode(rounded.codes)
            put = jax.lax.dynamic_update_slice_in_dim
            state = put(errors, lost, place * size, 1), put(codes, rounded.codes, first, 1)
            return state, replace(rounded, codes=None)

        blank = jnp.zeros(w.shape, jnp.float32), jnp.zeros(w.shape, jnp.uint8)
        (_, codes), told = jax.lax.scan(of_group, blank, jnp.arange(len(starts))[::-1])
        largest = jax.tree.map(jnp.max, told)
        return replace(largest, codes=codes, fallback=jnp.maximum(largest.fallback, unsolved))

    def _size(self, out: int, tile: int) -> int:
        """Columns in a group."""
        sizes = [size for size in range(tile, max(self.columns, tile) + 1, tile) if out % size == 0]
        return max(sizes, default=out)
