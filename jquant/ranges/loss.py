"""A range with clips learned on the calibration cross-entropy."""

from dataclasses import dataclass, field

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.errors import InputError
from jquant.formats import Format
from jquant.parts import check_part
from jquant.qtensor import QTensor
from jquant.ranges.base import Range
from jquant.ranges.search import Search


@dataclass(frozen=True)
class LossSearch:
    """Every group's scale times a factor, learned on the calibration cross-entropy by gradient descent.

    `Search` minimises the error of a group or of a layer's output; this range minimises the loss of the whole model.
    That is the aim of LAPQ (arXiv 1911.07190), with one factor a group as in OmniQuant (arXiv 2308.13137 §3.2). The
    gradient passes straight through rounding, as in LSQ (arXiv 1902.08153, Eq. 3). While `learning.clips.learn_clips`
    learns, all weights are rounded to nearest; blocks are rounded afterwards.

    Cost: `steps` forward and backward passes over `windows` calibration windows. The model, the gradient and two
    quantized copies of the weights in float32 must fit into memory.

    Attributes:
      start: the range whose scales are multiplied; factors start at 1.
      steps: of Adam.
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
          InputError: `start` returns quantized scales, which can't be multiplied.
        """
        scale, zero = self.start(w, format)
        if isinstance(scale, QTensor) or isinstance(zero, QTensor):
            raise InputError(f"LossSearch can't start from {self.start}, which chooses quantized scales itself.")
        return scale, zero


def clipped(grid: tuple[Array, Array | None], clips: Array) -> tuple[Array, Array | None]:
    """A grid with its range multiplied by `clips`: integer zeros stay, float zeros are multiplied too."""
    scale, zero = grid
    if zero is not None and zero.dtype != jnp.uint8:
        zero = (zero.astype(jnp.float32) * clips).astype(zero.dtype)
    return (scale.astype(jnp.float32) * clips).astype(scale.dtype), zero
