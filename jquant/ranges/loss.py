"""The range whose clips the calibration cross-entropy chooses."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.errors import InputError
from jquant.formats import Format, block_shape, expand, grouped
from jquant.parts import check_part
from jquant.qtensor import QTensor
from jquant.ranges.base import Range
from jquant.ranges.search import Search


@dataclass(frozen=True)
class LossSearch:
    """Every group's scale times a factor, learned on the calibration cross-entropy by gradient descent.

    Where Search asks which clip keeps a group or a layer's output, this asks the whole model (the aim of LAPQ, arXiv
    1911.07190, with one factor a group as in OmniQuant, arXiv 2308.13137 §3.2, but on the network's own loss). Rounding
    passes its gradient straight through, as in LSQ (arXiv 1902.08153, Eq. 3). All weights are quantized at once,
    to the nearest; `loss.learn_clips` does the learning, before any block is rounded for good.

    Cost: `steps` forward and backward passes over `windows` calibration windows, with the gradient and two quantized
    copies of the weights in float32. The model must fit.

    Attributes:
      start: where the factors begin, at 1.
      steps: Adam's.
      windows: calibration windows a step, taken in turn.
      rate: of Adam on the factors' logarithm.

    Raises:
      InputError: `start` needs calibration itself.
    """

    start: Range = field(default_factory=Search)
    steps: int = 64
    windows: int = 2
    rate: float = 0.01

    def __post_init__(self) -> None:
        check_part("LossSearch's start", self.start, Range)
        if self.steps < 1 or self.windows < 1 or not self.rate > 0:
            raise InputError(f"LossSearch takes steps, windows and a rate above 0, not {self}.")
        if self.start.needs:
            raise InputError(f"LossSearch starts from a range that looks at weights alone, not {self.start}.")

    @property
    def needs(self) -> frozenset[str]:
        """See `Range`."""
        return frozenset({"clips"})

    def __call__(
        self, w: Float[Array, "in out"], format: Format, clips: Float[Array, "groups columns"]
    ) -> tuple[Array, Array | None]:
        """See `Range`."""
        return clipped(self.initial(w, format), clips)

    def initial(self, w: Float[Array, "in out"], format: Format) -> tuple[Array, Array | None]:
        """The grid at factors of 1.

        Raises:
          InputError: `start` quantizes the scales itself, which leaves none to multiply.
        """
        scale, zero = self.start(w, format)
        if isinstance(scale, QTensor) or isinstance(zero, QTensor):
            raise InputError(f"LossSearch can't start from {self.start}, which chooses quantized scales itself.")
        return scale, zero


def clipped(grid: tuple[Array, Array | None], clips: Array) -> tuple[Array, Array | None]:
    """A grid whose range is multiplied by `clips`: an integer zero stays, a float one moves along."""
    scale, zero = grid
    if zero is not None and zero.dtype != jnp.uint8:
        zero = (zero.astype(jnp.float32) * clips).astype(zero.dtype)
    return (scale.astype(jnp.float32) * clips).astype(scale.dtype), zero


def rounded(w: Float[Array, "in out"], grid: tuple[Array, Array | None], format: Format) -> Array:
    """The weight's nearest values on a grid."""
    at = jax.tree.map(lambda v: expand(v, block_shape(format, w.shape), w.shape), grid)
    return format.decode(format.encode(w, *at), *at)


def clip_gradient(
    w: Float[Array, "in out"], grid: tuple[Array, Array | None], gradient: Float[Array, "in out"], format: Format
) -> Float[Array, "groups columns"]:
    """dL/d(log clip) of each block from dL/dŵ: a value inside the range has ∂ŵ/∂(log c) = ŵ − w, a clipped one ŵ."""
    block = block_shape(format, w.shape)
    at = jax.tree.map(lambda v: expand(v, block, w.shape), grid)
    value = format.decode(format.encode(w, *at), *at)
    ends = [format.decode(format.encode(jnp.float32(far), *at), *at) for far in (-3e38, 3e38)]
    inside = (w >= ends[0]) & (w <= ends[1])
    return jnp.sum(grouped(gradient * (value - jnp.where(inside, w, 0)), block), -2)
