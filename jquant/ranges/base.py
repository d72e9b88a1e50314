"""What every range offers."""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.formats import Block, Format, block_shape, grouped, real_members
from jquant.qtensor import QTensor


@runtime_checkable
class Range(Protocol):
    """The contract of every range."""

    @property
    def needs(self) -> frozenset[str]:
        """What it must be given beside the weight: a subset of {"gram", "clips"}."""
        ...

    def __call__(
        self,
        w: Float[Array, "in out"],
        format: Format,
        gram: Float[Array, "in in"] | None = None,
        clips: Float[Array, "groups columns"] | None = None,
    ) -> tuple[Array | QTensor, Array | QTensor | None]:
        """Scale and zero of each block, `[groups, columns]`: as `Format.grid` gives them, or quantized already.

        `clips` are factors on the min-max or other range, learned on the whole model's loss (`LossSearch`).
        """
        ...


def split(w: Float[Array, "in out"], format: Format) -> tuple[Array, Array, Block]:
    """The weight's blocks `[groups, members, columns]` in float32, a mask of real members, and the block's shape."""
    block = block_shape(format, w.shape)
    return grouped(w.astype(jnp.float32), block), real_members(w.shape, block), block


def ends(groups: Float[Array, "groups members columns"]) -> tuple[Array, Array]:
    """Smallest and largest member of each block."""
    return jnp.min(groups, -2), jnp.max(groups, -2)
