"""Small floating-point elements: FP8, and the block floats of the OCP MX specification and of NVIDIA."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from jquant.errors import InputError
from jquant.formats.base import Format, Group, as_stored, check_group, check_scale, ratio, round_scale

# Largest finite magnitude code by (exponent, mantissa) bits: E4M3 has one code for NaN (OCP FP8), E5M2 a whole exponent
# for infinities and NaNs (IEEE), the shorter formats none.
_LARGEST = {(4, 3): 0x7E, (5, 2): 0x7B, (2, 3): 0x1F, (3, 2): 0x1F, (2, 1): 0x07}


@dataclass(frozen=True)
class Float:
    """Sign, exponent and mantissa: value = scale · element; codes are the elements' bit patterns.

    Ties go to the even mantissa, values beyond the largest element saturate (OCP MX v1.0, §5.3 and §6.3).

    Attributes:
      exponent: its bits.
      mantissa: its bits.
      group: weights that share a scale.
      scale: how it is stored. "float8_e8m0fnu" (powers of two, MX) has the scale 2^(⌊log₂ absmax⌋ − largest exponent),
        so the absmax may saturate; every other has absmax / largest element.
    """

    exponent: int
    mantissa: int
    group: Group = "channel"
    scale: str | Format = "float32"

    def __post_init__(self) -> None:
        if (self.exponent, self.mantissa) not in _LARGEST:
            known = ", ".join(f"E{e}M{m}" for e, m in _LARGEST)
            raise InputError(f"There is no element E{self.exponent}M{self.mantissa}; known: {known}.")
        check_group(self.group)
        check_scale(self.scale)

    @property
    def bits(self) -> int:
        """Bits of sign, exponent and mantissa together."""
        return 1 + self.exponent + self.mantissa

    @property
    def has_zero(self) -> bool:
        """False: the elements are symmetric."""
        return False

    @property
    def largest(self) -> float:
        """The largest element."""
        code = _LARGEST[self.exponent, self.mantissa]
        return float((2**self.mantissa + code % 2**self.mantissa) * 2.0 ** ((code >> self.mantissa) - 1 + self._ulp))

    @property
    def _ulp(self) -> int:
        """log₂ of the smallest element, from the exponent's bias and the mantissa's width."""
        return 2 - 2 ** (self.exponent - 1) - self.mantissa

    def grid(self, low: Array, high: Array) -> tuple[Array, Array | None]:
        """See `Format.grid`."""
        absmax = jnp.maximum(-low, high).astype(jnp.float32)
        if self.scale == E8M0:
            largest_exponent = (_LARGEST[self.exponent, self.mantissa] >> self.mantissa) - 1 + self._ulp + self.mantissa
            # E8M0 reaches −127, but XLA's CPU backend flushes that to zero.
            return _power_of_two(jnp.clip(_exponent(absmax) - largest_exponent, -126, 127)).astype(E8M0), None
        scale = absmax / self.largest
        return round_scale(scale, self.scale) if isinstance(self.scale, str) else scale, None

    def encode(self, w: Array, scale: Array, zero: Array | None) -> Array:
        """See `Format.encode`."""
        value = ratio(w, scale)
        size = jnp.minimum(jnp.abs(value), self.largest)
        # A magnitude code counts the steps from 0: consecutive codes are consecutive elements, across binades too.
        binade = jnp.maximum(_exponent(size) - self.mantissa - self._ulp, 0)
        steps = jnp.round(size * _power_of_two(-(binade + self._ulp))).astype(jnp.int32)
        sign = jnp.signbit(value).astype(jnp.int32)
        return ((binade << self.mantissa) + steps | sign << (self.bits - 1)).astype(jnp.uint8)

    def decode(self, codes: Array, scale: Array, zero: Array | None) -> Array:
        """See `Format.decode`."""
        codes = codes.astype(jnp.int32)
        field, fraction = (codes >> self.mantissa) & (2**self.exponent - 1), codes & (2**self.mantissa - 1)
        steps = jnp.where(field > 0, fraction + 2**self.mantissa, fraction).astype(jnp.float32)
        size = steps * _power_of_two(jnp.maximum(field - 1, 0) + self._ulp)
        return jnp.where(codes >> (self.bits - 1) == 1, -size, size) * as_stored(scale, self.scale)


def _exponent(size: Array) -> Array:
    """⌊log₂ size⌋ of a non-negative float32, read from its bits; −127 for 0 and subnormals."""
    return (jax.lax.bitcast_convert_type(size, jnp.int32) >> 23) - 127


def _power_of_two(exponent: Array) -> Array:
    """2^exponent in float32, for exponents from −126 to 127."""
    return jax.lax.bitcast_convert_type(exponent + 127 << 23, jnp.float32)


def FP8_E4M3(group: Group = "channel", scale: str | Format = "float32") -> Float:
    """8-bit float with more precision (arXiv 2209.05433); `group=(128, 128)` for DeepSeek-V3's blocks."""
    return Float(4, 3, group, scale)


def FP8_E5M2(group: Group = "channel", scale: str | Format = "float32") -> Float:
    """8-bit float with more range (arXiv 2209.05433)."""
    return Float(5, 2, group, scale)


E8M0 = "float8_e8m0fnu"
MXFP4 = Float(2, 1, 32, E8M0)  # OCP MX v1.0, Table 1, as are the next four
MXFP6_E2M3 = Float(2, 3, 32, E8M0)
MXFP6_E3M2 = Float(3, 2, 32, E8M0)
MXFP8_E4M3 = Float(4, 3, 32, E8M0)
MXFP8_E5M2 = Float(5, 2, 32, E8M0)
# Blocks of 16 with E4M3 scales under one float32 scale for the whole tensor, absmax / (6 · 448).
NVFP4 = Float(2, 1, 16, Float(4, 3, "tensor", "float32"))
