"""Packed weights as kernels read them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped, UInt8

from jquant.formats import Format, block_shape, expand, unpack
from jquant.formats.base import as_argument


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix `[in, out]` as kernels read it, made from a `QTensor`.

    Attributes:
      codes: uint8 `[bytes, out]`, packed along `in`.
      scale: of each block, `[groups, columns]`, in its stored dtype.
      zero: None, or integer codes in uint8 or floats of the scale's shape.
      format: what the codes mean.
      in_features: rows before packing.
      levels: None, or a table that stands in for that of the format.
    """

    codes: Array
    scale: Array
    zero: Array | None
    format: Format
    in_features: int
    levels: Array | None = None

    def decode(self, codes: UInt8[Array, "*b rows out"], scale: Array, zero: Array | None) -> Float[Array, "..."]:
        """See `Format.decode`, of some rows' codes."""
        return self.format.decode(codes, scale, zero, *as_argument(self.levels))

    @property
    def shape(self) -> tuple[int, int]:
        """`[in, out]`."""
        return self.in_features, self.codes.shape[-1]

    def dequantize(self, dtype: Any) -> Float[Array, "in out"]:
        """The values of all weights."""
        block = block_shape(self.format, self.shape)
        scale, zero = jax.tree.map(lambda v: expand(v, block, self.shape), (self.scale, self.zero))
        return self.decode(unpack(self.codes, self.format.bits, self.in_features), scale, zero).astype(dtype)


def fill(a: Shaped[Array, "..."], axis: int, unit: int) -> Shaped[Array, "..."]:
    """With zeros at an axis' end until `unit` divides it."""
    filled = [(0, 0)] * a.ndim
    filled[axis] = (0, -a.shape[axis] % unit)
    return jnp.pad(a, filled)
