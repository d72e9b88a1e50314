"""SmoothQuant (arXiv 2211.10438): moves outliers of a layer's inputs into its weights, so that both fit 8 bits.

For a scale s per input channel, W is replaced by diag(s) W and the layer's input by x / s. The producer of x absorbs
1 / s exactly, as in AWQ. Eq. 4: sⱼ = max|Xⱼ|^α / max|Wⱼ|^(1 − α), both maxima of input channel j.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.errors import InputError
from jquant.formats import Format

# Both maxima are at least this, as in the reference implementation (smoothquant/smooth.py): dead channels stay finite.
FLOOR = 1e-5


@dataclass(frozen=True)
class SmoothQuant:
    """Divides the range of each input channel between activations and weights, when both are quantized.

    Attributes:
      alpha: α, from 0 (the weights' rows get equal maxima) to 1 (the inputs' channels do). At 1/2 the maximum of
        channel j is √(max|Xⱼ| · max|Wⱼ|) in both.
    """

    alpha: float = 0.5

    needs = frozenset({"abs_max"})

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"SmoothQuant's alpha lies between 0 and 1; {self.alpha} does not.")

    def __call__(
        self, weights: Sequence[Float[Array, "in _"]], formats: Sequence[Format], abs_max: Float[Array, " in"]
    ) -> Float[Array, " in"]:
        """The scale s by which input channels are multiplied (and their producer is divided), `[in]`, positive.

        Args:
          weights: the matrices that read the input; max|Wⱼ| is over all of them.
          formats: what each weight will be rounded to; not used by Eq. 4.
          abs_max: max|x| of each input channel over the calibration tokens and over the channels that must share a
            scale.
        """
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(w), -1) for w in weights]), 0)
        inputs = jnp.maximum(abs_max, FLOOR)
        return inputs**self.alpha / jnp.maximum(largest, FLOOR) ** (1 - self.alpha)
