"""Tables of levels under an absmax scale."""

import math
from dataclasses import dataclass
from itertools import zip_longest
from statistics import NormalDist

import jax.numpy as jnp
import numpy as np
from jax import Array

from jquant.errors import InputError
from jquant.formats.base import (
    Format,
    Group,
    as_stored,
    check_bits,
    check_group,
    check_scale,
    round_scale,
    times_inverse,
)


@dataclass(frozen=True)
class Codebook:
    """A table of levels: value = scale · levels[code], scale = absmax / `max |level|`.

    Attributes:
      levels: 2 to 256, ascending and finite; any sequence, kept as a tuple.
      group: weights that share a scale.
      scale: how the scale is stored; float32 by default, as in bitsandbytes.
      centred: for scales only, as in bitsandbytes' double quantization: their mean is subtracted first and kept as one
        zero, and groups are runs of the flattened transposed matrix.
    """

    levels: tuple[float, ...]
    group: Group = 64
    scale: str | Format = "float32"
    centred: bool = False

    def __post_init__(self) -> None:
        # Lists and arrays do not hash.
        object.__setattr__(self, "levels", tuple(map(float, self.levels)))
        if not 2 <= len(self.levels) <= 256:
            raise InputError(f"Codebook takes 2 to 256 levels, not {len(self.levels)}.")
        if not all(math.isfinite(level) for level in self.levels):
            raise InputError("Codebook levels must be finite.")
        if any(a >= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise InputError("Codebook levels must be strictly ascending.")
        check_group(self.group)
        check_scale(self.scale)

    @property
    def bits(self) -> int:
        """The smallest width with a code for every level."""
        return (len(self.levels) - 1).bit_length()

    @property
    def has_zero(self) -> bool:
        """False: the levels fix where zero is."""
        return False

    def grid(self, low: Array, high: Array) -> tuple[Array, Array | None]:
        """See `Format.grid`."""
        scale = jnp.maximum(-low, high).astype(jnp.float32) / max(map(abs, self.levels))
        return round_scale(scale, self.scale) if isinstance(self.scale, str) else scale, None

    def encode(self, w: Array, scale: Array, zero: Array | None, levels: Array | None = None) -> Array:
        """See `Format.encode`; a weight halfway between two levels takes the lower level, as in bitsandbytes.

        `levels` stands in for the table while it is learned.
        """
        levels = jnp.asarray(self.levels if levels is None else levels, jnp.float32)
        steps, midpoints = times_inverse(w, scale), (levels[1:] + levels[:-1]) / 2
        if self.bits > 4:
            return jnp.searchsorted(midpoints, steps, side="left").astype(jnp.uint8)
        # Faster than a binary search: 15 vectorised comparisons fuse into one pass.
        codes = jnp.zeros(steps.shape, jnp.uint8)
        for midpoint in midpoints:
            codes += (steps > midpoint).astype(jnp.uint8)
        return codes

    def decode(self, codes: Array, scale: Array, zero: Array | None, levels: Array | None = None) -> Array:
        """See `Format.decode`; `levels` as of `encode`."""
        values = self._look_up(codes, levels) * as_stored(scale, self.scale)
        if zero is None:
            return values
        # The bound keeps compilers from fusing product and sum into one rounding; bitsandbytes rounds twice.
        return jnp.minimum(values, jnp.finfo(jnp.float32).max) + zero

    def _look_up(self, codes: Array, levels: Array | None) -> Array:
        if self.bits > 4:
            return jnp.asarray(self.levels if levels is None else levels, jnp.float32)[codes]
        # A tree of selects vectorises; a gather takes one element at a time on a CPU and is slower still on a TPU.
        values = [jnp.float32(level) for level in self.levels] if levels is None else list(levels.astype(jnp.float32))
        for bit in range(self.bits):
            odd = (codes >> bit) & 1 == 1
            values = [
                jnp.where(odd, high, low) for low, high in zip_longest(values[::2], values[1::2], fillvalue=values[-1])
            ]
        return values[0]


# Quantiles of a normal distribution with an exact zero: QLoRA (arXiv 2305.14314), Appendix E.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# 1 sign, 2 exponent, 1 mantissa bit, with 0.0052 in the place of the first subnormal: bitsandbytes' table, over 12.
FP4_POSITIVE = (0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1.0)
FP4_LEVELS = (*(-level for level in reversed(FP4_POSITIVE)), 0.0, *FP4_POSITIVE)

# llama.cpp's table of IQ4_NL: denser near zero, slightly off centre.
IQ4_NL_LEVELS = (-127., -104., -83., -65., -49., -35., -22., -10., 1., 13., 25., 38., 53., 69., 89., 113.)  # fmt: skip


def normal_float_levels(bits: int, tail: float = 0.9677083) -> tuple[float, ...]:
    """NormalFloat levels of any width (QLoRA, arXiv 2305.14314, Eq. 4), with an exact zero.

    2^(bits−1) quantiles above zero and one fewer below it, evenly spaced in probability from `tail` to 1/2, scaled to
    [−1, 1]. The default tail is bitsandbytes', half-way between its 1 − 1/30 and 1 − 1/32; with it 4 bits give
    NF4_LEVELS to float rounding.
    """
    half = 2 ** (bits - 1)
    quantile = NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        return [quantile(tail + (0.5 - tail) * i / count) for i in range(count)]

    above, below = side(half), side(half - 1)
    return (*(-v / below[0] for v in below), 0.0, *(v / above[0] for v in reversed(above)))


def dynamic_levels() -> tuple[float, ...]:
    """The signed 8-bit dynamic data type of bitsandbytes (arXiv 2110.02861, §2.1): 256 levels, among them 0 and 1.

    Seven decades from 10⁻⁶ to 1: the n-th has 2ⁿ levels on either side of zero, the midpoints of an even division of
    [0.1, 1]. All is float32, divided like `torch.linspace` on a CPU, from both ends with fused multiply-adds, so the
    levels equal those of bitsandbytes' `create_dynamic_map` bit by bit.
    """
    positive = []
    for n in range(7):
        low, high, count = np.float32(0.1), np.float32(1), 2**n
        step, i = np.float64((high - low) / np.float32(count)), np.arange(count + 1)
        edges = np.where(2 * i < count, low + step * i, high - step * (count - i)).astype(np.float32)
        positive.append(np.float32(10.0 ** (n - 6)) * (edges[1:] + edges[:-1]) / 2)
    sides = np.concatenate(positive)
    return tuple(np.sort([*-sides, 0, *sides, 1]).tolist())


def NF4(group: Group = 64, scale: str | Format = "float32") -> Codebook:
    """4-bit NormalFloat (QLoRA, arXiv 2305.14314), block 64 as in bitsandbytes."""
    return Codebook(NF4_LEVELS, group, scale)


def NF3(group: Group = 64, scale: str | Format = "float32") -> Codebook:
    """3-bit NormalFloat."""
    return Codebook(normal_float_levels(3), group, scale)


def FP4(group: Group = 64, scale: str | Format = "float32") -> Codebook:
    """bitsandbytes' 4-bit float; `MXFP4` has that of the OCP specification."""
    return Codebook(FP4_LEVELS, group, scale)


def SEQ(bits: int = 2, group: Group = 64, scale: str | Format = "float16") -> Codebook:
    """2^bits levels half a step off zero, −(2^bits − 1)/2 … (2^bits − 1)/2 steps: ParetoQ's stretched elastic grid.

    arXiv 2502.02631, Eq. 6: better than a grid with a zero at 2 bits and less. Its α is 2^(bits−1) steps.
    """
    check_bits("SEQ", bits)
    half = (2**bits - 1) / 2
    return Codebook(tuple(code - half for code in range(2**bits)), group, scale)


def double_quantized(group: int = 256) -> Codebook:
    """The format of bitsandbytes' scales under double quantization (QLoRA, §3), for `scale=` of another format."""
    return Codebook(dynamic_levels(), group, "float32", centred=True)
