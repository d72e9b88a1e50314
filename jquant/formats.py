"""What a code means: frozen, hashable specifications that map weights to integer codes and back.

A format knows four things and nothing else: which values its codes stand for (`encode`, `decode`), how the end points
of a group become a stored scale and zero (`grid`), how many rows share them (`group`), and how wide a code is (`bits`).
Who chooses the end points is a range (`ranges.py`); who chooses the codes is a rounding (`rounding/`).

Weights are `[*l, in, out]` throughout. Groups run along `in`: row i belongs to group i // group, and the last group may
be short. Formats are values, so equal ones share one jit compilation.
"""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped, UInt8

from jquant.errors import InputError

Group = int | Literal["channel", "tensor"]


@runtime_checkable
class Format(Protocol):
    """The contract that every rounding and range relies on."""

    @property
    def bits(self) -> int:
        """Width of a packed code."""
        ...

    @property
    def group(self) -> Group:
        """Rows that share a scale: a number, "channel" for a whole column, "tensor" for the whole matrix."""
        ...

    @property
    def has_zero(self) -> bool:
        """Whether a group stores a zero point beside its scale."""
        ...

    def grid(self, low: Array, high: Array) -> tuple[Array, Array | None]:
        """Scale (in the stored dtype) and integer zero (uint8, or None) of a group whose values span [low, high]."""
        ...

    def encode(self, w: Array, scale: Array, zero: Array | None) -> UInt8[Array, "..."]:
        """Nearest code of each weight; all arguments broadcast."""
        ...

    def decode(self, codes: Array, scale: Array, zero: Array | None) -> Float[Array, "..."]:
        """Float32 value of each code; all arguments broadcast."""
        ...


@dataclass(frozen=True)
class Int:
    """Uniform integers: value = scale · (code − zero).

    Attributes:
      bits: 2 to 8.
      group: rows that share a scale: a number, "channel" or "tensor".
      symmetric: without a zero point; scale = absmax / (2^(bits−1) − 1), codes −2^(bits−1) … 2^(bits−1) − 1 stored
        with that offset. Otherwise the range [low, high], extended to hold 0, is split into 2^bits − 1 steps and the
        zero point is an integer code, so that 0 is always exact.
      scale_dtype: how the scale is stored; codes are chosen for the scale as stored.
    """

    bits: int
    group: Group = 128
    symmetric: bool = False
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"Int takes 2 to 8 bits, not {self.bits}.")
        _check_group(self.group)

    @property
    def has_zero(self) -> bool:
        """Asymmetric grids store one."""
        return not self.symmetric

    @property
    def _offset(self) -> int:
        return 2 ** (self.bits - 1)

    def grid(self, low: Array, high: Array) -> tuple[Array, Array | None]:
        """See `Format.grid`."""
        low, high = low.astype(jnp.float32), high.astype(jnp.float32)
        if self.symmetric:
            return _store(jnp.maximum(-low, high) / (self._offset - 1), self.scale_dtype), None
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        levels = 2**self.bits - 1
        scale = _store((high - low) / levels, self.scale_dtype)
        return scale, jnp.clip(jnp.round(_ratio(-low, scale)), 0, levels).astype(jnp.uint8)

    def encode(self, w: Array, scale: Array, zero: Array | None) -> Array:
        """See `Format.encode`; ties go to the even multiple of the scale."""
        steps = jnp.round(_ratio(w, scale)) + (self._offset if zero is None else zero.astype(jnp.float32))
        return jnp.clip(steps, 0, 2**self.bits - 1).astype(jnp.uint8)

    def decode(self, codes: Array, scale: Array, zero: Array | None) -> Array:
        """See `Format.decode`."""
        origin = self._offset if zero is None else zero.astype(jnp.float32)
        return (codes.astype(jnp.float32) - origin) * scale.astype(jnp.float32)


@dataclass(frozen=True)
class Codebook:
    """A table of levels under an absmax scale: value = scale · levels[code].

    Attributes:
      levels: ascending, at most 256.
      group: rows that share a scale: a number, "channel" or "tensor".
      scale_dtype: float32 by default, as bitsandbytes stores it.
    """

    levels: tuple[float, ...]
    group: Group = 64
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if not 2 <= len(self.levels) <= 256:
            raise InputError(f"Codebook takes 2 to 256 levels, not {len(self.levels)}.")
        if any(a >= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise InputError("Codebook levels must be strictly ascending.")
        _check_group(self.group)

    @property
    def bits(self) -> int:
        """Smallest width that numbers every level."""
        return (len(self.levels) - 1).bit_length()

    @property
    def has_zero(self) -> bool:
        """Never: the levels place zero."""
        return False

    def grid(self, low: Array, high: Array) -> tuple[Array, Array | None]:
        """See `Format.grid`."""
        absmax = jnp.maximum(-low, high).astype(jnp.float32)
        return _store(absmax / max(map(abs, self.levels)), self.scale_dtype), None

    def encode(self, w: Array, scale: Array, zero: Array | None) -> Array:
        """See `Format.encode`; a weight halfway between two levels takes the lower, as in bitsandbytes."""
        levels = jnp.asarray(self.levels, jnp.float32)
        # bitsandbytes multiplies by the reciprocal; dividing would move weights that lie next to a midpoint.
        scale = scale.astype(jnp.float32)
        ratio = w.astype(jnp.float32) * jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))
        # Counting the midpoints below beats a binary search: 15 vectorised comparisons fuse into one pass.
        codes = jnp.zeros(ratio.shape, jnp.uint8)
        for midpoint in (levels[1:] + levels[:-1]) / 2:
            codes += (ratio > midpoint).astype(jnp.uint8)
        return codes

    def decode(self, codes: Array, scale: Array, zero: Array | None) -> Array:
        """See `Format.decode`."""
        return self._look_up(codes) * scale.astype(jnp.float32)

    def _look_up(self, codes: Array) -> Array:
        if self.bits > 4:
            return jnp.asarray(self.levels, jnp.float32)[codes]
        # A tree of selects vectorises; a gather takes one element at a time on a CPU and is worse on a TPU.
        values = [jnp.float32(level) for level in self.levels]
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


def NF4(group: Group = 64) -> Codebook:
    """4-bit NormalFloat (QLoRA, arXiv 2305.14314), block 64 as in bitsandbytes."""
    return Codebook(NF4_LEVELS, group)


def group_rows(format: Format, in_features: int) -> int:
    """Rows per group of a matrix with `in_features` rows.

    Raises:
      InputError: the group is larger than the matrix.
    """
    if isinstance(format.group, str):
        return in_features
    if format.group > in_features:
        raise InputError(f"A group of {format.group} rows is larger than the weight's {in_features}.")
    return format.group


def expand_groups(values: Array, rows: int, in_features: int) -> Array:
    """Per-group values `[*l, groups, out]` repeated to one row per weight, `[*l, in, out]`."""
    if values.shape[-2] == 1:
        return values  # broadcasts
    return jnp.repeat(values, rows, axis=-2)[..., :in_features, :]


def pack(codes: UInt8[Array, "*l n out"], bits: int) -> UInt8[Array, "*l bytes out"]:
    """Packs along axis −2 as a little-endian bit stream: 8 codes take exactly `bits` bytes, a rest is filled up."""
    n = codes.shape[-2]
    fill = [(0, 0)] * (codes.ndim - 2) + [(0, -n % 8), (0, 0)]
    lanes = jnp.pad(codes, fill).reshape(*codes.shape[:-2], -1, 8, codes.shape[-1]).astype(jnp.uint16)
    packed = []
    for byte in range(bits):
        value = jnp.zeros_like(lanes[..., 0, :])
        for lane in range(8):
            shift = lane * bits - byte * 8
            if -bits < shift < 8:
                value |= (lanes[..., lane, :] << shift) if shift >= 0 else (lanes[..., lane, :] >> -shift)
        packed.append(value.astype(jnp.uint8))
    return jnp.stack(packed, -2).reshape(*codes.shape[:-2], -1, codes.shape[-1])


def unpack(packed: UInt8[Array, "*l bytes out"], bits: int, n: int) -> UInt8[Array, "*l n out"]:
    """Inverse of `pack`; `n` is the number of codes along axis −2."""
    if bits == 8:
        return packed[..., :n, :]
    chunk = packed.reshape(*packed.shape[:-2], -1, bits, packed.shape[-1])
    lanes = []
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        value = chunk[..., byte, :] >> shift
        if shift + bits > 8:
            value |= chunk[..., byte + 1, :] << (8 - shift)
        lanes.append(value & (2**bits - 1))
    return jnp.stack(lanes, -2).reshape(*packed.shape[:-2], -1, packed.shape[-1])[..., :n, :]


def _check_group(group: Group) -> None:
    if group not in ("channel", "tensor") and not (isinstance(group, int) and group > 0):
        raise InputError(f'A group is a positive number of rows, "channel" or "tensor", not {group!r}.')


def _ratio(w: Array, scale: Array) -> Array:
    """w / scale in float32, 0 where the scale is 0 (a group without weights)."""
    scale = scale.astype(jnp.float32)
    return jnp.where(scale == 0, 0, w.astype(jnp.float32) / jnp.where(scale == 0, 1, scale))


def _store(scale: Array, dtype: str) -> Array:
    """Rounds a scale to its stored dtype; one that is not zero never becomes 0 or infinite."""
    limits = jnp.finfo(dtype)
    stored = jnp.clip(scale.astype(jnp.float32), float(limits.smallest_subnormal), float(limits.max)).astype(dtype)
    return jnp.where(scale == 0, jnp.zeros_like(stored), stored)


def grouped(w: Shaped[Array, "*l in out"], rows: int) -> Shaped[Array, "*l groups rows out"]:
    """Splits `in` into groups of `rows`; a short last group is filled up with zeros."""
    w = jnp.pad(w, [(0, 0)] * (w.ndim - 2) + [(0, -w.shape[-2] % rows), (0, 0)])
    return w.reshape(*w.shape[:-2], -1, rows, w.shape[-1])
