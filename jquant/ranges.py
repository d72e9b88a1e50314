"""How a group's scale and zero are chosen, before any code is.

A range is a frozen dataclass called as `range(w, format, gram)`; it returns the stored scale and the integer zero
(`[groups, out]`, uint8 or None). `gram` is the Gram matrix of the weight's inputs, or None where nothing was seen.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.errors import InputError
from jquant.formats import Format, group_rows, grouped


@runtime_checkable
class Range(Protocol):
    """The contract of every range."""

    def __call__(
        self, w: Float[Array, "in out"], format: Format, gram: Float[Array, "in in"] | None
    ) -> tuple[Array, Array | None]:
        """Scale and zero, `[groups, out]` each (`[1, 1]` per tensor)."""
        ...


@dataclass(frozen=True)
class MinMax:
    """The whole range of each group: nothing clips."""

    def __call__(
        self, w: Float[Array, "in out"], format: Format, gram: Float[Array, "in in"] | None = None
    ) -> tuple[Array, Array | None]:
        """See `Range`."""
        return format.grid(*_ends(grouped(w, group_rows(format, w.shape[-2])), format))


@dataclass(frozen=True)
class Search:
    """The min-max range clipped where that leaves the least rounding error, group by group.

    Both ends shrink together by a common factor first; where the format has a zero point, and so the ends are free of
    each other, the upper one is then searched alone, and the lower one.

    Attributes:
      metric: what is minimised, for Δ = Q(w) − w within one group: "mse" Σ Δ², "diagonal" Σ Hᵢᵢ Δᵢ² with H the Gram
        matrix, "gram" Δᵀ H_gg Δ with the group's block of it, the true change of the layer's output if the other groups
        stayed exact (AWQ's clipping objective, arXiv 2306.00978 §3.2, with H in place of stored samples).
      steps: factors tried, evenly spaced from 1 down to `smallest`.
      smallest: the strongest clipping tried.

    Raises:
      InputError: `metric` needs a Gram matrix and there is none.
    """

    metric: Literal["mse", "diagonal", "gram"] = "mse"
    steps: int = 21
    smallest: float = 0.6

    def __call__(
        self, w: Float[Array, "in out"], format: Format, gram: Float[Array, "in in"] | None = None
    ) -> tuple[Array, Array | None]:
        """See `Range`."""
        if self.metric != "mse" and gram is None:
            raise InputError(f"The range search by {self.metric} needs calibration text.")
        rows = group_rows(format, w.shape[-2])
        groups = grouped(w.astype(jnp.float32), rows)
        low, high = _ends(groups, format)
        # A codebook without a zero would count the filling of a short group as error.
        real = grouped(jnp.ones((w.shape[-2], 1)), rows)
        weight = None if gram is None or self.metric == "mse" else _weight(gram, rows, self.metric)

        def attempt(low: Array, high: Array):
            scale, zero = format.grid(low, high)
            at = jax.tree.map(lambda v: v[:, None], (scale, zero))
            loss = _loss((format.decode(format.encode(groups, *at), *at) - groups) * real, weight)
            return jnp.sum(loss, keepdims=True) if format.group == "tensor" else loss, (low, high), (scale, zero)

        def sweep(best, move_low: bool, move_high: bool):
            _, (kept_low, kept_high), _ = best

            def step(best, shrink: Array):
                new = attempt(low * shrink if move_low else kept_low, high * shrink if move_high else kept_high)
                better = new[0] < best[0]
                return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best), None

            # A scan holds one candidate at a time: memory does not grow with `steps`.
            return jax.lax.scan(step, best, jnp.linspace(1.0, self.smallest, self.steps, dtype=jnp.float32))[0]

        best = sweep(attempt(low, high), True, True)
        if format.has_zero:
            best = sweep(sweep(best, False, True), True, False)
        return best[2]


def _ends(groups: Float[Array, "groups rows out"], format: Format) -> tuple[Array, Array]:
    axes = (-2, -1) if format.group == "tensor" else (-2,)
    low, high = jnp.min(groups, axes, keepdims=True), jnp.max(groups, axes, keepdims=True)
    return low[:, 0], high[:, 0]


def _weight(gram: Array, rows: int, metric: str) -> Array:
    """The Gram matrix's diagonal `[groups, rows, 1]` or its diagonal blocks `[groups, rows, rows]`."""
    if metric == "diagonal":
        return grouped(jnp.diagonal(gram)[:, None], rows)
    groups = -(-gram.shape[0] // rows)
    pad = groups * rows - gram.shape[0]
    blocks = jnp.pad(gram, ((0, pad), (0, pad))).reshape(groups, rows, groups, rows)
    return blocks[jnp.arange(groups), :, jnp.arange(groups), :]


def _loss(delta: Float[Array, "groups rows out"], weight: Array | None) -> Float[Array, "groups out"]:
    if weight is None:
        return jnp.sum(delta**2, -2)
    if weight.shape[-1] == 1:
        return jnp.sum(weight * delta**2, -2)
    return jnp.sum(delta * jnp.einsum("gij,gjo->gio", weight, delta, precision="highest"), -2)
