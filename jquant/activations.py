"""How the inputs of a quantized weight are quantized: W8A8 and LLM.int8()."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jquant.errors import InputError
from jquant.formats import Format, Int, block_shape, expand, grouped

PER_TOKEN_INT8 = Int(8, "channel", symmetric=True, scale="float32", full_range=False)


@dataclass(frozen=True)
class Activation:
    """The format of a layer's inputs at run time.

    Attributes:
      format: of xᵀ `[in, tokens]`, so that "channel" is one scale a token, a number the rows of a block within a token,
        "tensor" one scale for all.
      static: one scale per tensor from the calibration text's absmax, instead of scales from the inputs themselves.
      outliers: inputs of this magnitude and above stay in 16 bits, whole features (columns of x) at a time, and meet
        weights that are dequantized: LLM.int8() (arXiv 2208.07339, §3.2, which takes 6). None for no such part.
    """

    format: Format = PER_TOKEN_INT8
    static: bool = False
    outliers: float | None = None

    def __post_init__(self) -> None:
        if self.outliers is not None and not self.outliers > 0:
            raise InputError(f"An outlier threshold is a positive magnitude, not {self.outliers}.")


def quantize_inputs(
    x: Float[Array, "tokens in"], activation: Activation, scale: Float[Array, "1 1"] | None = None
) -> Float[Array, "tokens in"]:
    """x rounded to the activation's format, as float32; features that hold outliers are 0.

    Args:
      x: a layer's inputs.
      activation: their format.
      scale: the static one, from calibration.

    Raises:
      InputError: the activation is static and there is no scale.
    """
    x, format = x.astype(jnp.float32), activation.format
    if activation.static and scale is None:
        raise InputError("A static activation scale needs calibration text.")
    columns = x.T
    block = block_shape(format, columns.shape)
    if activation.static:
        grid = (scale, None)
    else:
        # As in bitsandbytes, an outlier does not widen its token's scale, the rest of its feature does.
        inliers = columns if activation.outliers is None else jnp.where(_beyond(columns, activation), 0, columns)
        members = grouped(inliers, block)
        grid = format.grid(jnp.min(members, -2), jnp.max(members, -2))
    at = jax.tree.map(lambda v: expand(v, block, columns.shape), grid)
    rounded = format.decode(format.encode(columns, *at), *at).T
    return rounded if activation.outliers is None else jnp.where(outlier_features(x, activation), 0, rounded)


def outlier_features(x: Float[Array, "tokens in"], activation: Activation) -> Bool[Array, " in"]:
    """Features with an outlier in any token: they stay in 16 bits for all of them."""
    return jnp.any(_beyond(x, activation), 0)


def _beyond(x: Array, activation: Activation) -> Array:
    return jnp.abs(x) >= activation.outliers
