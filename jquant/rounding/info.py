"""The contract of every rounding, and what it returns beside the codes."""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.formats import Format
from jquant.qtensor import QTensor, Stored, dequantize

ROWS = 2048  # of H Δ at a time


def _unknown() -> Array:
    return jnp.float32(jnp.nan)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SolveInfo:
    """What was done to one matrix; every field a scalar array.

    Attributes:
      error: trace((W − Ŵ)ᵀ H (W − Ŵ)), the mean squared change of the layer's output summed over `out`; NaN without H.
      energy: trace(Wᵀ H W), to set the error against.
      damping: what was added to H's diagonal, as a multiple of its mean.
      attempts: factorisations tried before one was finite.
      dead: inputs that were never active.
      held_out_error: the error on other windows than those that H was observed on; NaN without them.
      held_out_energy: the energy there.
      fallback: 1 where a finite H had no finite factorisation, so that the method's part that needs one was left out:
        GPTQ rounded plainly, or no error was propagated; else 0.
    """

    error: Any
    energy: Any
    damping: Any
    attempts: Any
    dead: Any
    held_out_error: Any = field(default_factory=_unknown)
    held_out_energy: Any = field(default_factory=_unknown)
    fallback: Any = field(default_factory=lambda: jnp.int32(0))


@runtime_checkable
class Rounding(Protocol):
    """The contract of every rounding."""

    @property
    def needs(self) -> frozenset[str]:
        """What it must be given beside weight and grid: a subset of {"gram", "held_out"}."""
        ...

    def __call__(
        self,
        w: Float[Array, "in out"],
        scale: Stored,
        zero: Stored,
        gram: Float[Array, "in in"] | None,
        format: Format,
        held_out: Float[Array, "in in"] | None = None,
    ) -> tuple[QTensor, SolveInfo]:
        """Codes of `w` on the grid, and what was done.

        Args:
          w: the weight.
          scale: of each group, `[groups, columns]`, as a range chose it.
          zero: of each group, or None.
          gram: mean x xᵀ over the calibration windows.
          format: what a code means.
          held_out: mean x xᵀ over other windows.
        """
        ...


def output_energy(delta: Float[Array, "in out"], gram: Float[Array, "in in"] | None) -> Float[Array, ""]:
    """trace(Δᵀ H Δ); NaN where no Gram matrix was observed.

    Of a wide H some rows at a time, since H Δ is another matrix of the weight's size. Columns are summed last: where
    they are split over devices, nothing is moved until then.
    """
    if gram is None:
        return _unknown()
    rows = next(rows for rows in range(min(len(gram), ROWS), 0, -1) if len(gram) % rows == 0)

    def add(so_far: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        some_gram, some_delta = part
        return so_far + jnp.sum(some_delta * jnp.matmul(some_gram, delta, precision="highest"), 0), None

    parts = (gram.reshape(-1, rows, len(gram)), delta.reshape(-1, rows, delta.shape[1]))
    blank = jnp.zeros(delta.shape[1], jnp.result_type(delta, gram))
    return jnp.sum(jax.lax.scan(add, blank, parts)[0])


def solve_info(
    w: Float[Array, "in out"],
    q: QTensor,
    gram: Float[Array, "in in"] | None,
    held_out: Float[Array, "in in"] | None,
    damping: Array | float = 0.0,
    attempts: Array | int = 0,
    fallback: Array | int = 0,
) -> SolveInfo:
    """What a rounding of `w` to `q` did."""
    delta = w - dequantize(q)
    return SolveInfo(
        error=output_energy(delta, gram),
        energy=output_energy(w, gram),
        damping=jnp.float32(damping),
        attempts=jnp.int32(attempts),
        dead=jnp.int32(0) if gram is None else jnp.sum(jnp.diagonal(gram) == 0),
        held_out_error=output_energy(delta, held_out),
        held_out_energy=output_energy(w, held_out),
        fallback=jnp.int32(fallback),
    )
