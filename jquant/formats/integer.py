"""Uniform integer grids."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax import Array

from jquant.errors import InputError
from jquant.formats.base import (
    Format,
    Group,
    as_stored,
    check_bits,
    check_group,
    check_scale,
    extreme,
    ratio,
    round_scale,
    times_inverse,
)


@dataclass(frozen=True)
class Int:
    """Uniform integers: value = scale · (code − zero), or scale · code + zero if the zero is a float.

    Attributes:
      bits: 2 to 8.
      group: weights that share a scale.
      symmetric: without a zero; scale = absmax / (2^(bits−1) − 1), codes −2^(bits−1) … 2^(bits−1) − 1 stored with that
        offset. Otherwise the range [low, high] is split into 2^bits − 1 steps.
      scale: how the scale is stored; codes are chosen for the scale as stored.
      zero: "integer": the range is extended to contain 0 and the zero is a code, so 0 is exact. "float": the
        zero is the range's lower end itself, stored as the scale is (llama.cpp's Q4_1).
      full_range: whether a symmetric grid has the code −2^(bits−1), which only clipping and GPTQ use.
      ties: where ties go: to the "even" multiple of the scale, or as in ggml, "up" or "away" from zero. With these two
        the weight is multiplied by the reciprocal of the range's scale, not yet rounded to its dtype, as in ggml.
    """

    bits: int
    group: Group = 128
    symmetric: bool = False
    scale: str | Format = "float16"
    zero: Literal["integer", "float"] = "integer"
    full_range: bool = True
    ties: Literal["even", "up", "away"] = "even"

    def __post_init__(self) -> None:
        check_bits("Int", self.bits)
        check_group(self.group)
        check_scale(self.scale)
        if self.zero not in ("integer", "float"):
            raise InputError(f'Int takes zero="integer" or "float", not {self.zero!r}.')
        if self.ties not in ("even", "up", "away"):
            raise InputError(f'Int takes ties="even", "up" or "away", not {self.ties!r}.')

    @property
    def has_zero(self) -> bool:
        """True for asymmetric grids."""
        return not self.symmetric

    @property
    def _offset(self) -> int:
        return 2 ** (self.bits - 1)

    def grid(self, low: Array, high: Array) -> tuple[Array, Array | None]:
        """See `Format.grid`."""
        low, high = low.astype(jnp.float32), high.astype(jnp.float32)
        if self.symmetric:
            return self._round(jnp.maximum(-low, high) / (self._offset - 1)), None
        levels = 2**self.bits - 1
        if self.zero == "float":
            low = jnp.minimum(low, 0) if isinstance(self.scale, Format) else self._round(low)
            return self._round((high - low.astype(jnp.float32)) / levels), low
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        scale = self._round((high - low) / levels)
        return scale, jnp.clip(jnp.round(ratio(-low, scale)), 0, levels).astype(jnp.uint8)

    def encode(self, w: Array, scale: Array, zero: Array | None) -> Array:
        """See `Format.encode`."""
        if self.zero == "float" and zero is not None:
            steps = self._steps(w.astype(jnp.float32) - zero.astype(jnp.float32), scale, 0)
        else:
            steps = self._steps(w, scale, self._offset if zero is None else zero.astype(jnp.float32))
        lowest = int(self.symmetric and not self.full_range)
        return jnp.clip(steps, lowest, 2**self.bits - 1).astype(jnp.uint8)

    def decode(self, codes: Array, scale: Array, zero: Array | None) -> Array:
        """See `Format.decode`."""
        codes, scale = codes.astype(jnp.float32), as_stored(scale, self.scale)
        if self.zero == "float" and not self.symmetric:
            return codes * scale + (0 if zero is None else as_stored(zero, self.scale))
        return (codes - (self._offset if zero is None else zero.astype(jnp.float32))) * scale

    def _steps(self, w: Array, scale: Array, origin: Array | int) -> Array:
        if self.ties == "even":
            return jnp.round(ratio(w, scale)) + origin
        steps = times_inverse(w, scale)
        if self.ties == "up":
            return jnp.floor(steps + (origin + 0.5))
        return jnp.sign(steps) * jnp.floor(jnp.abs(steps) + 0.5) + origin

    def _round(self, scale: Array) -> Array:
        # ggml chooses codes before it rounds the scale; quantized scales are rounded by their own format.
        if isinstance(self.scale, Format) or self.ties != "even":
            return scale
        return round_scale(scale, self.scale)


@dataclass(frozen=True)
class UInt:
    """Multiples of a signed scale without an offset: value = scale · code, all of one sign within a group.

    k-quants store the scales and minima of their sub-blocks in it.

    Attributes:
      bits: 2 to 8.
      group: values that share a scale.
      scale: how that scale is stored; codes are chosen before it is rounded, as in ggml.
    """

    bits: int
    group: Group
    scale: str | Format = "float16"

    def __post_init__(self) -> None:
        check_bits("UInt", self.bits)
        check_group(self.group)
        check_scale(self.scale)

    @property
    def has_zero(self) -> bool:
        """False: the first code is zero."""
        return False

    def grid(self, low: Array, high: Array) -> tuple[Array, Array | None]:
        """See `Format.grid`."""
        return extreme(low, high).astype(jnp.float32) / (2**self.bits - 1), None

    def encode(self, w: Array, scale: Array, zero: Array | None) -> Array:
        """See `Format.encode`."""
        return jnp.clip(jnp.round(times_inverse(w, scale)), 0, 2**self.bits - 1).astype(jnp.uint8)

    def decode(self, codes: Array, scale: Array, zero: Array | None) -> Array:
        """See `Format.decode`."""
        return codes.astype(jnp.float32) * as_stored(scale, self.scale)
