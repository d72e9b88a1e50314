"""Quantization of a weight's inputs: W8A8 and LLM.int8()."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, UInt8

from jquant.errors import InputError
from jquant.formats import Format, Int, block_shape, expand, grouped

PER_TOKEN_INT8 = Int(8, "channel", symmetric=True, scale="float32", full_range=False)


@dataclass(frozen=True)
class Activation:
    """The format of a layer's inputs at run time.

    Attributes:
      format: of xᵀ `[in, tokens]`: "channel" is one scale a token, a number the size of a block within a token,
        "tensor" one scale for all.
      static: one scale per tensor from the calibration text's absmax, instead of scales from the inputs themselves.
      outliers: features (columns of x) with an input of this magnitude or above stay in 16 bits and multiply
        dequantized weights: LLM.int8() (arXiv 2208.07339, §3.2, with 6). None quantizes all features.
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
      InputError: the activation is static and `scale` is None.
    """
    codes, grid = input_codes(x, activation, scale)
    rounded = activation.format.decode(codes, *_per_input(grid, activation.format, x))
    return rounded if activation.outliers is None else jnp.where(outlier_features(x, activation), 0, rounded)


def fake_quant_inputs(x: Float[Array, "*b in"], activation: Activation, scale: Array | None) -> Float[Array, "*b in"]:
    """The inputs that a quantized weight multiplies, in x's dtype, with the straight-through gradient: that of x.

    Features with outliers are in 16 bits, the others rounded. Arguments and errors as of `quantize_inputs`.
    """
    fixed = jax.lax.stop_gradient(x)
    flat = fixed.reshape(-1, x.shape[-1])
    rounded = quantize_inputs(flat, activation, scale)
    if activation.outliers is not None:
        rounded = jnp.where(outlier_features(flat, activation), in_16_bits(flat), rounded)
    # x - fixed is 0: the value is the rounded one to the last bit.
    return rounded.reshape(x.shape).astype(x.dtype) + (x - fixed)


def in_16_bits(x: Array) -> Float[Array, "..."]:
    """x rounded to its dtype if that has 16 bits, else to float16; as float32."""
    return x.astype(x.dtype if x.dtype.itemsize == 2 else jnp.float16).astype(jnp.float32)


def input_codes(
    x: Float[Array, "tokens in"], activation: Activation, scale: Float[Array, "1 1"] | None = None
) -> tuple[UInt8[Array, "tokens in"], tuple[Array, Array | None]]:
    """Codes of x, and the scales and zeros of the blocks of xᵀ; outlier features have the code of 0.

    Symmetric integers with scales from the inputs themselves are round(x · (1 / absmax · largest code)), computed in
    this order: the codes are those of bitsandbytes' `int8_vectorwise_quant`, ties included. Arguments and errors are
    those of `quantize_inputs`.
    """
    x, format = x.astype(jnp.float32), activation.format
    inliers = x
    if activation.outliers is not None:
        # As in bitsandbytes, outliers do not widen their tokens' scales, but the other inputs of their features do.
        inliers = jnp.where(_beyond(x, activation), 0, x)
        x = jnp.where(outlier_features(x, activation), 0, x)
    if activation.static:
        if scale is None:
            raise InputError("A static activation scale needs calibration text.")
        return format.encode(x, *_per_input((scale, None), format, x)), (scale, None)
    members = grouped(inliers.T, block_shape(format, inliers.T.shape))
    low, high = jnp.min(members, -2), jnp.max(members, -2)
    grid = format.grid(low, high)
    if isinstance(format, Int) and format.symmetric:
        # The bound replaces the reciprocal for a token of zeros.
        inverse = jnp.minimum(1 / jnp.maximum(-low, high), 2.0**120) * (2 ** (format.bits - 1) - 1)
        return format.encode(x * _per_input(inverse, format, x), jnp.float32(1), None), grid
    return format.encode(x, *_per_input(grid, format, x)), grid


def _per_input(grid: Any, format: Format, x: Float[Array, "tokens in"]) -> Any:
    """The blocks' values, repeated so that they broadcast against x."""
    block = block_shape(format, x.T.shape)
    return jax.tree.map(lambda v: expand(v, block, x.T.shape).T, grid)


def outlier_features(x: Float[Array, "tokens in"], activation: Activation) -> Bool[Array, " in"]:
    """Features with an outlier in any token."""
    return jnp.any(_beyond(x, activation), 0)


def _beyond(x: Array, activation: Activation) -> Array:
    return jnp.abs(x) >= (jnp.inf if activation.outliers is None else activation.outliers)
