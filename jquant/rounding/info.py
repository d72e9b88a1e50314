"""What a rounding returns beside the codes."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.formats import Format
from jquant.qtensor import QTensor, Stored


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
    """

    error: Any
    energy: Any
    damping: Any
    attempts: Any
    dead: Any


@runtime_checkable
class Rounding(Protocol):
    """The contract of every rounding."""

    @property
    def needs(self) -> frozenset[str]:
        """What it must be given beside weight and grid: a subset of {"gram"}."""
        ...

    def __call__(
        self,
        w: Float[Array, "in out"],
        scale: Stored,
        zero: Stored,
        gram: Float[Array, "in in"] | None,
        format: Format,
    ) -> tuple[QTensor, SolveInfo]:
        """Codes of `w` on the grid, and what was done."""
        ...


def output_energy(delta: Float[Array, "in out"], gram: Float[Array, "in in"] | None) -> Float[Array, ""]:
    """trace(Δᵀ H Δ); NaN where no Gram matrix was observed."""
    return jnp.float32(jnp.nan) if gram is None else jnp.sum(delta * jnp.matmul(gram, delta, precision="highest"))
