"""The contract of every range."""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.formats import Block, Format, block_shape, grouped, real_members
from jquant.qtensor import QTensor


@runtime_checkable
class Range(Protocol):
    """The contract of every range."""

    @property
    def needs(self) -> frozenset[Any]:
        """The keywords of its call: "gram", "clips", or statistics of one's own (`Statistic`)."""
        ...

    def __call__(
        self, w: Float[Array, "in out"], format: Format, /, *_: Any, **seen: Any
    ) -> tuple[Array | QTensor, Array | QTensor | None]:
        """Scale and zero of each block, `[groups, columns]`: as from `Format.grid`, or quantized already.

        Args:
          w: the weight.
          format: what a code means.
          seen: only what `needs` names, by name. "gram": mean x xᵀ over the calibration tokens, `[in, in]`. "clips":
            factors on each block's range, `[groups, columns]`, learned on the whole model's loss (`LossSearch`).
        """
        ...


def split(w: Float[Array, "in out"], format: Format) -> tuple[Array, Array, Block]:
    """The weight's blocks `[groups, members, columns]` in float32, a mask of real members, and the block's shape."""
    block = block_shape(format, w.shape)
    return grouped(w.astype(jnp.float32), block), real_members(w.shape, block), block


def ends(groups: Float[Array, "groups members columns"]) -> tuple[Array, Array]:
    """Smallest and largest member of each block."""
    return jnp.min(groups, -2), jnp.max(groups, -2)
