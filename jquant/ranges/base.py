"""What every range offers."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.formats import Block, Format, block_shape, grouped, real_members
from jquant.qtensor import QTensor


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossModel:
    """The calibration loss around the float weight, to second order: L(w + Δ) ≈ L(w) + Σ gᵢ Δᵢ + ½ Σ Fᵢ Δᵢ².

    Attributes:
      gradient: g, the mean gradient of the loss, float32 `[in, out]`.
      curvature: F, the mean squared gradient (the empirical Fisher information's diagonal), float32 `[in, out]`.
    """

    gradient: Any
    curvature: Any


@runtime_checkable
class Range(Protocol):
    """The contract of every range."""

    @property
    def needs(self) -> frozenset[str]:
        """What it must be given beside the weight: a subset of {"gram", "loss"}."""
        ...

    def __call__(
        self,
        w: Float[Array, "in out"],
        format: Format,
        gram: Float[Array, "in in"] | None = None,
        loss: LossModel | None = None,
    ) -> tuple[Array | QTensor, Array | QTensor | None]:
        """Scale and zero of each block, `[groups, columns]`: as `Format.grid` gives them, or quantized already."""
        ...


def split(w: Float[Array, "in out"], format: Format) -> tuple[Array, Array, Block]:
    """The weight's blocks `[groups, members, columns]` in float32, a mask of real members, and the block's shape."""
    block = block_shape(format, w.shape)
    return grouped(w.astype(jnp.float32), block), real_members(w.shape, block), block


def ends(groups: Float[Array, "groups members columns"]) -> tuple[Array, Array]:
    """Smallest and largest member of each block."""
    return jnp.min(groups, -2), jnp.max(groups, -2)
