"""Rounds a weight, and computes the error of the layer's outputs, for every rounding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jquant.parts import given
from jquant.qtensor import Grid, QTensor, dequantize
from jquant.rounding.base import Rounding
from jquant.stats import check_gram

ROWS = 2048  # rows of H Δ at a time


def _unknown() -> Array:
    return jnp.float32(jnp.nan)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SolveInfo:
    """The result of rounding one matrix; every field is a scalar array.

    Attributes:
      error: trace((W − Ŵ)ᵀ H (W − Ŵ)), the mean squared change of the layer's output summed over `out`; NaN without H.
      energy: trace(Wᵀ H W), to compare the error with.
      damping: added to H's diagonal, as a multiple of its mean.
      attempts: factorisations tried until one was finite.
      dead: inputs that were never active.
      held_out_error: the error on held-out windows; NaN without them.
      held_out_energy: the energy on held-out windows.
      fallback: 1 if a finite H had no finite factorisation, so GPTQ rounded to nearest or no error was propagated;
        else 0.
    """

    error: Any
    energy: Any
    damping: Any
    attempts: Any
    dead: Any
    held_out_error: Any = field(default_factory=_unknown)
    held_out_energy: Any = field(default_factory=_unknown)
    fallback: Any = field(default_factory=lambda: jnp.int32(0))

    def __repr__(self) -> str:
        """Plain numbers, without those that are unknown."""
        told = {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self)}
        return f"SolveInfo({', '.join(f'{name}={value}' for name, value in told.items() if value != 'nan')})"


def _plain(value: Any) -> str:
    try:
        return f"{float(value):.4g}"
    except TypeError:  # being traced, or stacked
        return repr(value)


def output_energy(delta: Float[Array, "in out"], gram: Float[Array, "in in"] | None) -> Float[Array, ""]:
    """trace(Δᵀ H Δ); NaN without a Gram matrix.

    A wide H is taken some rows at a time, since H Δ has the weight's size. Columns are summed last: if they are split
    over devices, only that sum communicates.
    """
    if gram is None:
        return _unknown()
    rows = next(rows for rows in range(min(len(gram), ROWS), 0, -1) if len(gram) % rows == 0)

    def add(so_far: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        gram_rows, delta_rows = part
        return so_far + jnp.sum(delta_rows * jnp.matmul(gram_rows, delta, precision="highest"), 0), None

    parts = (gram.reshape(-1, rows, len(gram)), delta.reshape(-1, rows, delta.shape[1]))
    blank = jnp.zeros(delta.shape[1], jnp.result_type(delta, gram))
    return jnp.sum(jax.lax.scan(add, blank, parts)[0])


def joined_infos(parts: Sequence[SolveInfo]) -> SolveInfo:
    """Of groups of outputs as one: errors and energies are summed, of the others the largest counts."""
    sums = ("error", "energy", "held_out_error", "held_out_energy")
    each = {entry.name: jnp.stack([getattr(part, entry.name) for part in parts]) for entry in fields(SolveInfo)}
    return SolveInfo(**{name: jnp.sum(v) if name in sums else jnp.max(v) for name, v in each.items()})


def round_to_grid(
    w: Float[Array, "in out"], grid: Grid, rounding: Rounding, seen: Mapping[str, Any]
) -> tuple[QTensor, SolveInfo, Bool[Array, ""]]:
    """Rounds and packs a weight; returns it, its `SolveInfo`, and whether all codes fit the format.

    Args:
      w: the weight.
      grid: the codes' values.
      rounding: chooses the codes.
      seen: values of statistics by name: those that the rounding needs, and "gram" and "held_out", if known, to
        measure errors.

    Raises:
      InputError: a statistic that the rounding needs is missing, or belongs to another weight.
    """
    gram, held_out = (seen.get(name) for name in ("gram", "held_out"))
    check_gram(gram, w)
    check_gram(held_out, w)
    w = w.astype(jnp.float32)
    rounded = rounding(w, grid, **given(rounding, seen))
    codes = rounded.codes.astype(jnp.int32)  # uint8 would turn 256 into 0
    fits = jnp.all((codes >= 0) & (codes < 2**grid.format.bits))
    q = (rounded.grid or grid).pack(rounded.codes.astype(jnp.uint8))
    delta = w - dequantize(q)
    info = SolveInfo(
        error=output_energy(delta, gram),
        energy=output_energy(w, gram),
        damping=jnp.float32(rounded.damping),
        attempts=jnp.int32(rounded.attempts),
        dead=jnp.int32(0) if gram is None else jnp.sum(jnp.diagonal(gram) == 0),
        held_out_error=output_energy(delta, held_out),
        held_out_energy=output_energy(w, held_out),
        fallback=jnp.int32(rounded.fallback),
    )
    return q, info, fits
