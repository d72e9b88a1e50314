"""A table of levels for each column of a weight."""

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float16, UInt8

from jquant.errors import InputError
from jquant.formats.base import Group, as_stored, check_scale, ratio, round_scale


@dataclass(frozen=True)
class ColumnCodebook:
    """2^bits levels for each column: value = scale · levels[code, column].

    The levels are of the weight's own: float16 `[2^bits, out]`, ascending, in units of the column's one scale, stored
    beside the codes. `LNQ` learns them. Until then they are those with the least squared error on normal weights of
    variance 1 (Max 1960, Lloyd 1982).

    Attributes:
      bits: 2 to 4. The levels of a column of n weights take 16 · 2^bits / n bits a weight beside that.
      scale: the dtype of scales. With the levels' own range in float16, it spares small weights from rounding to 0.
    """

    bits: int = 4
    scale: str = "float16"

    column_levels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 4:
            raise InputError(f"ColumnCodebook takes 2, 3 or 4 bits, not {self.bits!r}.")
        if not isinstance(self.scale, str):
            raise InputError(f"ColumnCodebook's scales are stored in a floating dtype, not {self.scale!r}.")
        check_scale(self.scale)

    @property
    def group(self) -> Group:
        """ "channel": the scale is the column's."""
        return "channel"

    @property
    def has_zero(self) -> bool:
        """False: the levels fix where zero is."""
        return False

    @property
    def deviations(self) -> float:
        """The first levels' largest, in standard deviations of the weights."""
        return float(normal_levels(self.bits)[-1])

    def own_levels(self, shape: tuple[int, ...]) -> Float16[Array, "*l levels out"]:
        """The levels before they are learned, of a weight `[*l, in, out]`."""
        first = jnp.asarray(normal_levels(self.bits))[:, None]
        return jnp.broadcast_to(first, (*shape[:-2], len(first), shape[-1]))

    def grid(self, low: Array, high: Array) -> tuple[Array, None]:
        """See `Format.grid`; the larger end is `deviations`."""
        return round_scale(jnp.maximum(-low, high).astype(jnp.float32) / self.deviations, self.scale), None

    def encode(
        self, w: Array, scale: Array, zero: Array | None, levels: Float[Array, "levels out"] | None = None
    ) -> UInt8[Array, "..."]:
        """See `Format.encode`; a weight halfway between two levels takes the lower one."""
        table = self._table(levels)
        steps = ratio(w, scale)
        codes = jnp.zeros(jnp.broadcast_shapes(steps.shape, table.shape[1:]), jnp.uint8)
        for midpoint in (table[1:] + table[:-1]) / 2:
            codes += (steps > midpoint).astype(jnp.uint8)
        return codes

    def decode(
        self, codes: Array, scale: Array, zero: Array | None, levels: Float[Array, "levels out"] | None = None
    ) -> Float[Array, "..."]:
        """See `Format.decode`."""
        values = list(self._table(levels))
        # A tree of selects vectorises, where a gather takes one element at a time.
        for bit in range(self.bits):
            odd = (codes >> bit) & 1 == 1
            values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
        return values[0] * as_stored(scale, self.scale)

    def _table(self, levels: Array | None) -> Array:
        return jnp.asarray(normal_levels(self.bits) if levels is None else levels, jnp.float32)


@lru_cache
def normal_levels(bits: int) -> Float16[np.ndarray, " levels"]:
    """The 2^bits levels with the least squared error on a standard normal variable, by Lloyd's iteration."""
    normal, count = NormalDist(), 2**bits
    levels = np.array([normal.inv_cdf((code + 0.5) / count) for code in range(count)])
    for _ in range(2000):  # at 4 bits the last ones move by less than float16 can say
        ends = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        mass = np.diff([normal.cdf(end) for end in ends])
        levels = -np.diff([normal.pdf(end) for end in ends]) / mass
    return ((levels - levels[::-1]) / 2).astype(np.float16)
