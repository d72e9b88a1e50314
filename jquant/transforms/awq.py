"""AWQ (arXiv 2306.00978): scales up important input channels before rounding, and undoes it in their producer.

For a scale s per input channel, W is replaced by diag(s) W and the layer's input by x / s. The producer of x (a norm's
gain, a projection's output channels) absorbs 1 / s exactly. The scale is s = mean|x|^α, Eq. 5, with the α in [0, 1)
that changes the outputs least, Eq. 4. The paper computes that error on stored samples. Here it is exact
over all calibration tokens, from their Gram matrix: trace(Δᵀ H Δ) for Δ = diag(1/s) Q(diag(s) W) − W.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.errors import InputError
from jquant.formats import Format
from jquant.parts import check_part, given
from jquant.qtensor import dequantize, quantize
from jquant.ranges import MinMax, Range
from jquant.rounding.info import output_energy


@dataclass(frozen=True)
class AWQ:
    """Searches the channel scales of the matrices that read one input.

    Attributes:
      steps: number of α tried, i / steps; α = 0 is no scaling.
      range: how groups get their scales during the search; min-max by default, since the paper clips afterwards. A
        range with a search of its own multiplies the time.
    """

    steps: int = 20
    range: Range = field(default_factory=MinMax)

    needs = frozenset({"gram", "abs_mean"})

    def __post_init__(self) -> None:
        check_part("AWQ's range", self.range, Range)
        if self.steps < 1:
            raise InputError(f"AWQ takes at least 1 step, not {self.steps}.")

    def __call__(
        self,
        weights: Sequence[Float[Array, "in _"]],
        formats: Sequence[Format],
        gram: Sequence[Float[Array, "in in"]],
        abs_mean: Float[Array, " in"],
    ) -> Float[Array, " in"]:
        """The scale s by which input channels are multiplied (and their producer is divided), `[in]`, positive.

        Args:
          weights: the matrices that read the input.
          formats: what each weight will be rounded to.
          gram: each weight's Gram matrix (they may weight tokens differently).
          abs_mean: mean |x| of each input channel, averaged over channels that must share a scale.
        """

        def scale_at(alpha: Array) -> Array:
            s = jnp.maximum(abs_mean, 1e-5) ** alpha
            return s / jnp.sqrt(jnp.max(s) * jnp.min(s))

        def error_at(s: Array) -> Array:
            total = jnp.float32(0)
            for w, h, format in zip(weights, gram, formats, strict=True):
                scaled = w * s[:, None]
                grid = self.range(scaled, format, **given(self.range, {"gram": h / (s[:, None] * s)}))
                total += output_energy(dequantize(quantize(scaled, *grid, format)) / s[:, None] - w, h)
            return total

        def step(best, alpha):
            loss = error_at(scale_at(alpha))
            better = loss < best[0]
            return (jnp.where(better, loss, best[0]), jnp.where(better, alpha, best[1])), None

        alphas = jnp.arange(self.steps) / self.steps
        start = (error_at(jnp.ones_like(abs_mean)), alphas[0])
        (_, alpha), _ = jax.lax.scan(step, start, alphas[1:])
        return scale_at(alpha)
