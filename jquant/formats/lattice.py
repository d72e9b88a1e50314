"""Codes for eight weights on the E8 lattice (QuIP#, arXiv 2402.04396, §4.2)."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int32, Integer, UInt8

from jquant.errors import InputError
from jquant.formats.base import Group, as_stored, check_group, check_scale, check_tiles, ratio, round_scale
from jquant.formats.packing import cut_words, join_words
from jquant.formats.vectors import SCORES, first_true


@dataclass(frozen=True)
class E8P:
    """Eight weights along `in` have one code of 16, 24 or 32 bits: a point of E8 + ¼ times the scale.

    16 bits: one byte picks absolute values, of 256 vectors of halves of odd numbers (`_absolute`); 7 bits are signs,
    and the eighth sign makes the sum even; the last bit adds ¼ to all coordinates or subtracts it. At 3 bits a point of
    E8 near zero, divided by 2.04, is added (8 more bits); at 4 bits a second point of E8 + ¼, divided by 3.45. Each
    point is the nearest one to what those before it leave.

    Attributes:
      bits: per weight, 2 to 4.
      group: weights that share a scale, in multiples of 8 rows.
      scale: the dtype of scales.
    """

    bits: int = 2
    group: Group = "channel"
    scale: str = "float16"

    tile = (8, 1)

    def __post_init__(self) -> None:
        if self.bits not in FACTORS:
            raise InputError(f"E8P takes 2, 3 or 4 bits, not {self.bits!r}.")
        check_group(self.group)
        check_tiles("E8P", self.group, self.tile)
        if not isinstance(self.scale, str):
            raise InputError(f"E8P's scales are stored in a floating dtype, not {self.scale!r}.")
        check_scale(self.scale)

    @property
    def has_zero(self) -> bool:
        """False: the points lie around zero."""
        return False

    @property
    def deviations(self) -> float:
        """Where the ends of a group of normal weights lie, in standard deviations, for the least squared error."""
        return LARGEST * FACTORS[self.bits]

    def grid(self, low: Array, high: Array) -> tuple[Array, None]:
        """See `Format.grid`; the larger end is the first point's largest coordinate."""
        return round_scale(jnp.maximum(-low, high).astype(jnp.float32) / LARGEST, self.scale), None

    def encode(self, w: Float[Array, "*l in out"], scale: Array, zero: Array | None) -> UInt8[Array, "*l in out"]:
        """See `Format.encode`. All weights of a tile are taken to have its first scale."""
        x = ratio(w, scale)
        x = x.reshape(*x.shape[:-2], -1, 8, x.shape[-1])
        word = _nearest_of(_nearest_halves, x)
        codes = cut_words(word, 2, 8)
        if self.bits > 2:
            rest = x - _halves(word)
            find, part, width = (_nearest_small, 2.04, 1) if self.bits == 3 else (_nearest_halves, 3.45, 2)
            codes |= cut_words(_nearest_of(find, rest * part), width, 8) << 2
        return codes.reshape(w.shape)

    def decode(self, codes: UInt8[Array, "*l in out"], scale: Array, zero: Array | None) -> Float[Array, "*l in out"]:
        """See `Format.decode`."""
        digits = codes.reshape(*codes.shape[:-2], -1, 8, codes.shape[-1])
        x = _halves(join_words(digits & 3, 2).astype(jnp.int32))
        if self.bits == 3:
            x += _small(join_words(digits >> 2, 1)) / 2.04
        elif self.bits == 4:
            x += _halves(join_words(digits >> 2, 2).astype(jnp.int32)) / 3.45
        return x.reshape(codes.shape) * as_stored(scale, self.scale)


LARGEST = 2.75
# The scale over the root mean square of normal weights with the least squared error, found by search (test_lattice).
FACTORS = {2: 0.965, 3: 1.01, 4: 1.075}


@lru_cache
def _absolute() -> np.ndarray:
    """[256, 8]: 2 |v|, odd numbers; the 227 with Σ v² ≤ 10, and the first 29 with five halves of 3, of Σ v² = 12.

    Which 29 of those with Σ v² = 12 are taken changes the squared error on normal weights by less than 0.3 %.
    """
    short = [v for v in product((1, 3, 5), repeat=8) if sum(x * x for x in v) <= 40]
    long = [tuple(3 if i in three else 1 for i in range(8)) for three in combinations(range(8), 5)]
    return np.array(short + long[: 256 - len(short)], np.int32)


@lru_cache
def _near_zero() -> np.ndarray:
    """[256, 8]: 2 v for v in E8 with Σ v² ≤ 2, 241, and for 15 of the 16 points of E8 with a 2 and seven 0."""
    whole = [v for v in product((-2, 0, 2), repeat=8) if sum(x * x for x in v) in (0, 8)]
    halves = [v for v in product((-1, 1), repeat=8) if sum(v) % 4 == 0]
    far = [tuple(size * (i == j) for j in range(8)) for i in range(8) for size in (4, -4)]
    return np.array(whole + halves + far[:15], np.int32)


def _halves(word: Int32[Array, "*l tiles out"]) -> Float[Array, "*l tiles 8 out"]:
    """The point of E8 + ¼ of a code of 16 bits."""
    doubled = _absolute()
    # 2 bits for each of 1, 3, 5 and one for whether an odd number of signs makes Σ v even: a table of one word a code.
    table = np.sum(doubled // 2 << 2 * np.arange(8), 1) | (np.sum(doubled, 1) // 2 % 2) << 16
    sizes, signs = jnp.asarray(table, jnp.int32)[word & 255], (word >> 8) & 127
    odd = (jax.lax.population_count(signs) + (sizes >> 16)) & 1
    shifts = jnp.arange(8, dtype=jnp.int32)[:, None]
    size = ((sizes[..., None, :] >> 2 * shifts) & 3).astype(jnp.float32) + 0.5
    negative = ((signs | odd << 7)[..., None, :] >> shifts) & 1
    return jnp.where(negative == 1, -size, size) + jnp.where(word >> 15 == 1, -0.25, 0.25)[..., None, :]


def _small(word: Integer[Array, "*l tiles out"]) -> Float[Array, "*l tiles 8 out"]:
    """The point of E8 near zero of a code of 8 bits."""
    return jnp.moveaxis(jnp.asarray(_near_zero() / 2, jnp.float32)[word], -1, -2)


def _nearest_of(find, x: Float[Array, "*l tiles 8 out"]) -> Int32[Array, "*l tiles out"]:
    """`find` for some tiles at a time, so that memory does not grow with the weight."""
    lines = x.reshape(-1, 8, x.shape[-1])
    batch = max(1, SCORES // (256 * x.shape[-1]))
    found = find(lines) if len(lines) <= batch else jax.lax.map(find, lines, batch_size=batch)
    return found.reshape(*x.shape[:-2], x.shape[-1])


def _nearest_halves(x: Float[Array, "*b 8 out"]) -> Int32[Array, "*b out"]:
    """The code of 16 bits whose point is nearest: for either shift, the |v| that is nearest to |x ∓ ¼|.

    With the signs of x, 2 Σ |vᵢ| |xᵢ| − Σ vᵢ² is to be largest. Where those signs make Σ v odd, one of them changes, of
    the coordinate where that costs least, 4 |vᵢ| |xᵢ|.
    """
    absolute = _absolute() / 2
    odd = jnp.asarray(np.sum(_absolute(), 1) // 2 % 2, jnp.int32)[:, None]

    def shifted(shift: float) -> tuple[Array, Array]:
        size, negative = jnp.abs(x - shift), (x < shift).astype(jnp.int32)
        table = jnp.asarray(absolute, jnp.float32)
        score = 2 * jnp.einsum("ci,...io->...co", table, size, precision="highest") - jnp.sum(table**2, 1)[:, None]
        cost = jnp.full(score.shape, jnp.inf)
        for i in range(8):
            cost = jnp.minimum(cost, table[:, i, None] * size[..., None, i, :])
        flipped = (jnp.sum(negative, -2)[..., None, :] + odd) & 1
        score = score - jnp.where(flipped == 1, 4 * cost, 0)
        best = jnp.max(score, -2)
        chosen = first_true(score == best[..., None, :])
        # Once more for the chosen vector: which sign changes.
        v = jnp.moveaxis(table[chosen], -1, -2)
        costs = v * size
        change = (costs == jnp.min(costs, -2, keepdims=True)) & (
            (jnp.sum(negative, -2, keepdims=True) + odd[chosen, 0][..., None, :]) & 1 == 1
        )
        at = jnp.arange(8, dtype=jnp.int32)[:, None]
        change &= at == first_true(change)[..., None, :]
        signs = jnp.sum((negative ^ change.astype(jnp.int32))[..., :7, :] << at[:7], -2, dtype=jnp.int32)
        distance = jnp.sum(size**2, -2) - best
        return distance, chosen | signs << 8 | (int(shift < 0) << 15)

    (up, with_up), (down, with_down) = shifted(0.25), shifted(-0.25)
    return jnp.where(up <= down, with_up, with_down)


def _nearest_small(x: Float[Array, "*b 8 out"]) -> Int32[Array, "*b out"]:
    """The code of 8 bits whose point is nearest."""
    table = jnp.asarray(_near_zero() / 2, jnp.float32)
    score = 2 * jnp.einsum("ci,...io->...co", table, x, precision="highest") - jnp.sum(table**2, 1)[:, None]
    return first_true(score == jnp.max(score, -2, keepdims=True))
