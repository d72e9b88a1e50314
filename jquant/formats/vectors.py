"""Codes for vectors of weights: the nearest of a table, or a sum of vectors of several tables."""

import math
from dataclasses import dataclass
from functools import lru_cache, reduce
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float16, Int32, UInt8

from jquant.errors import InputError
from jquant.formats.base import Block, Group, as_stored, check_group, check_scale, check_tiles, ratio, round_scale
from jquant.formats.packing import cut_words, join_words

# The most scores that are compared at a time: 4 MB of float32, about a core's share of cache.
SCORES = 1 << 20


@dataclass(frozen=True)
class VectorCodebook:
    """A table of vectors: `dim` weights along `in` are the scale times one of 2^(bits · dim) vectors.

    The code of a vector is its place in the table. Each of its weights keeps `bits` bits of the code.

    Attributes:
      levels: the vectors, 2 to 65,536 of one length; any sequences, kept as tuples.
      group: weights that share a scale, in multiples of `dim` rows.
      scale: the dtype of scales.

    Raises:
      InputError: `levels` are no such table; its number of vectors is no power of 2, or leaves a weight no whole number
        of bits.
    """

    levels: tuple[tuple[float, ...], ...]
    group: Group = "channel"
    scale: str = "float16"

    def __post_init__(self) -> None:
        try:
            table = np.asarray(self.levels, np.float64)
        except (TypeError, ValueError):
            table = np.zeros(0)
        if table.ndim != 2 or not table.size or not np.isfinite(table).all() or not table.any():
            raise InputError("VectorCodebook takes vectors of one length, of finite numbers that are not all 0.")
        # Lists and arrays do not hash.
        object.__setattr__(self, "levels", tuple(map(tuple, np.atleast_2d(table).tolist())))
        count, dim = len(table), len(table[0])
        bits = count.bit_length() - 1
        if count != 2**bits or bits % dim or not 1 <= bits // dim <= 8 or bits > 16:
            raise InputError(
                f"VectorCodebook takes 2^(bits · dim) vectors, 65,536 at most, with 1 to 8 bits a weight, not {count} "
                f"vectors of {dim}."
            )
        _check("VectorCodebook", self.group, self.tile, self.scale)

    @property
    def tile(self) -> Block:
        """A vector's weights: `dim` rows of one column."""
        return len(self.levels[0]), 1

    @property
    def bits(self) -> int:
        """Of each weight."""
        return (len(self.levels).bit_length() - 1) // self.tile[0]

    @property
    def has_zero(self) -> bool:
        """False: the table fixes where zero is."""
        return False

    @property
    def deviations(self) -> float:
        """The largest coordinate over the table's root mean square, which `RMS` makes that of the weights."""
        return float(np.abs(self.levels).max() / np.sqrt(np.mean(np.square(self.levels))))

    def grid(self, low: Array, high: Array) -> tuple[Array, None]:
        """See `Format.grid`; the larger end is the table's largest coordinate."""
        largest = float(np.abs(self.levels).max())
        return round_scale(jnp.maximum(-low, high).astype(jnp.float32) / largest, self.scale), None

    def encode(
        self,
        w: Float[Array, "*l in out"],
        scale: Array,
        zero: Array | None,
        levels: Float[Array, "levels dim"] | None = None,
    ) -> UInt8[Array, "*l in out"]:
        """The nearest vector's code. All weights of a tile are taken to have its first scale; of equals the first."""
        x = tiled(ratio(w, scale), self.tile[0])
        return cut_words(nearest_vector(x, self._table(levels)), self.bits, self.tile[0]).reshape(w.shape)

    def decode(
        self,
        codes: UInt8[Array, "*l in out"],
        scale: Array,
        zero: Array | None,
        levels: Float[Array, "levels dim"] | None = None,
    ) -> Float[Array, "*l in out"]:
        """See `Format.decode`."""
        words = join_words(tiled(codes, self.tile[0]), self.bits)
        return vectors(self._table(levels), words).reshape(codes.shape) * as_stored(scale, self.scale)

    def _table(self, levels: Array | None) -> Array:
        return jnp.asarray(self.levels if levels is None else levels, jnp.float32)


@dataclass(frozen=True)
class Additive:
    """Sums of vectors: `dim` weights along `in` are the scale times Σₘ Cₘ[bₘ] (AQLM, arXiv 2401.06118, §3.1).

    The codebooks Cₘ are of the weight's own: float16 `[codebooks, 2^index_bits, dim]`, stored beside its codes. `AQLM`
    learns them. Until then they are random codes for normal weights, the same on every machine: Cₘ is normal with the
    variance (1 − D) Dᵐ, D = 2^(−2 index_bits / dim), for what is left after m of them at Shannon's bound.

    Attributes:
      codebooks: how many.
      index_bits: of each index bₘ. All indices of a vector are one code, and each weight keeps `bits` bits of it.
      dim: weights that are coded together.
      group: weights that share a scale, in multiples of `dim` rows.
      scale: the dtype of scales.

    Raises:
      InputError: codebooks · index_bits is above 32, or is no multiple of `dim` with 1 to 8 bits a weight.
    """

    codebooks: int = 2
    index_bits: int = 8
    dim: int = 8
    group: Group = "channel"
    scale: str = "float16"

    def __post_init__(self) -> None:
        sizes = (self.codebooks, self.index_bits, self.dim)
        if any(type(size) is not int or size < 1 for size in sizes) or self.index_bits > 16:
            raise InputError(f"Additive takes codebooks from 1, index_bits from 1 to 16 and dim from 1, not {sizes}.")
        total = self.codebooks * self.index_bits
        if total > 32 or total % self.dim or total > 8 * self.dim:
            raise InputError(
                f"Additive takes codebooks · index_bits = bits · dim, at most 32, with 1 to 8 bits a weight, not "
                f"{self.codebooks} · {self.index_bits} for {self.dim} weights."
            )
        _check("Additive", self.group, self.tile, self.scale)

    @property
    def tile(self) -> Block:
        """A vector's weights: `dim` rows of one column."""
        return self.dim, 1

    @property
    def bits(self) -> int:
        """Of each weight, without the codebooks."""
        return self.codebooks * self.index_bits // self.dim

    @property
    def has_zero(self) -> bool:
        """False: the codebooks lie around zero."""
        return False

    @property
    def deviations(self) -> float:
        """The largest sum of the first codebooks' coordinates, in standard deviations of the weights."""
        return float(np.abs(self._first()).max((1, 2)).sum())

    def own_levels(self, shape: tuple[int, ...]) -> Float16[Array, "*l codebooks levels dim"]:
        """The codebooks before they are learned, of a weight `[*l, in, out]`."""
        first = self._first()
        return jnp.broadcast_to(jnp.asarray(first), (*shape[:-2], *first.shape))

    def grid(self, low: Array, high: Array) -> tuple[Array, None]:
        """See `Format.grid`; the larger end is `deviations`."""
        return round_scale(jnp.maximum(-low, high).astype(jnp.float32) / self.deviations, self.scale), None

    def encode(
        self,
        w: Float[Array, "*l in out"],
        scale: Array,
        zero: Array | None,
        levels: Float[Array, "codebooks levels dim"] | None = None,
    ) -> UInt8[Array, "*l in out"]:
        """Codes of the nearest vector of each codebook to what those before it leave, which may not be the best sum.

        All weights of a tile are taken to have its first scale.
        """
        rest, indices = tiled(ratio(w, scale), self.dim), []
        for table in self._tables(levels):
            indices.append(nearest_vector(rest, table))
            rest = rest - vectors(table, indices[-1])
        return self.codes_of(jnp.stack(indices)).reshape(w.shape)

    def decode(
        self,
        codes: UInt8[Array, "*l in out"],
        scale: Array,
        zero: Array | None,
        levels: Float[Array, "codebooks levels dim"] | None = None,
    ) -> Float[Array, "*l in out"]:
        """See `Format.decode`."""
        sums = summed(self._tables(levels), self.indices_of(codes))
        return sums.reshape(codes.shape) * as_stored(scale, self.scale)

    def indices_of(self, codes: UInt8[Array, "*l in out"]) -> Int32[Array, "codebooks *l tiles out"]:
        """The index into each codebook, of each tile."""
        words = join_words(tiled(codes, self.dim), self.bits)
        cut = [words >> (self.index_bits * m) for m in range(self.codebooks)]
        return jnp.stack([(part & (2**self.index_bits - 1)).astype(jnp.int32) for part in cut])

    def codes_of(self, indices: Int32[Array, "codebooks *l tiles out"]) -> UInt8[Array, "*l tiles dim out"]:
        """Inverse of `indices_of`, by tiles."""
        places = [index.astype(jnp.uint32) << (self.index_bits * m) for m, index in enumerate(indices)]
        return cut_words(jnp.sum(jnp.stack(places), 0, dtype=jnp.uint32), self.bits, self.dim)

    def _first(self) -> Float16[np.ndarray, "codebooks levels dim"]:
        return _random(self.codebooks, self.index_bits, self.dim)

    def _tables(self, levels: Array | None) -> Float[Array, "codebooks levels dim"]:
        return jnp.asarray(self._first() if levels is None else levels, jnp.float32)


def _check(name: str, group: Group, tile: Block, scale: str) -> None:
    check_group(group)
    check_tiles(name, group, tile)
    if not isinstance(scale, str):
        raise InputError(f"{name}'s scales are stored in a floating dtype, not {scale!r}.")
    check_scale(scale)


@lru_cache
def _random(codebooks: int, index_bits: int, dim: int) -> Float16[np.ndarray, "codebooks levels dim"]:
    """See `Additive`. Quantiles in the order of the generator's raw bits, whose stream NumPy never changes (NEP 19)."""
    shape, error = (codebooks, 2**index_bits, dim), 4.0 ** (-index_bits / dim)
    order = np.argsort(np.random.PCG64(0).random_raw(math.prod(shape)), kind="stable")
    quantile = NormalDist().inv_cdf
    normal = np.array([quantile((rank + 0.5) / len(order)) for rank in order]).reshape(shape)
    spread = np.sqrt((1 - error) * error ** np.arange(codebooks))
    return (normal * spread[:, None, None]).astype(np.float16)


def tiled(values: Array, dim: int) -> Array:
    """`[*l, in, out]` as `[*l, tiles, dim, out]`."""
    return values.reshape(*values.shape[:-2], -1, dim, values.shape[-1])


def vectors(table: Float[Array, "levels dim"], words: Array) -> Float[Array, "*b dim out"]:
    """The vectors with these codes, `[*b, out]`."""
    return jnp.moveaxis(table[words], -1, -2)


def summed(
    tables: Float[Array, "codebooks levels dim"], indices: Int32[Array, "codebooks *b out"]
) -> Float[Array, "*b dim out"]:
    """Σₘ Cₘ[bₘ]."""
    terms = [vectors(table, index) for table, index in zip(tables, indices, strict=True)]
    return reduce(jnp.add, terms)


def nearest_vector(x: Float[Array, "*b dim out"], table: Float[Array, "levels dim"]) -> Int32[Array, "*b out"]:
    """The code of the nearest vector of a table, the first of equals: 2 x · v − v · v is largest.

    Some tiles and some vectors at a time, so that memory grows with neither.
    """
    out = x.shape[-1]
    part = len(table)
    while part > 64 and part * out > SCORES:
        part //= 2
    parts, sizes = table.reshape(-1, part, table.shape[1]), jnp.sum(table**2, 1).reshape(-1, part, 1)

    def find(lines: Float[Array, "*b dim out"]) -> Int32[Array, "*b out"]:
        def compare(best: tuple[Array, Array], some: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
            start, vectors, size = some
            score = 2 * jnp.einsum("cd,...do->...co", vectors, lines, precision="highest") - size
            top = jnp.max(score, -2)
            place = start + first_true(score == top[..., None, :])
            better = top > best[0]
            return (jnp.where(better, top, best[0]), jnp.where(better, place, best[1])), None

        shape = (*lines.shape[:-2], out)
        blank = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)
        starts = part * jnp.arange(len(parts), dtype=jnp.int32)
        if len(parts) == 1:
            return compare(blank, (starts[0], parts[0], sizes[0]))[0][1]
        return jax.lax.scan(compare, blank, (starts, parts, sizes))[0][1]

    lines = x.astype(jnp.float32).reshape(-1, *x.shape[-2:])
    batch = max(1, SCORES // (part * out))
    found = find(lines) if len(lines) <= batch else jax.lax.map(find, lines, batch_size=batch)
    return found.reshape(*x.shape[:-2], out)


def first_true(true: Array) -> Int32[Array, "*b out"]:
    """The first index on axis −2 that is true; reductions of integers vectorise where argmax does not."""
    index = jnp.arange(true.shape[-2], dtype=jnp.int32)[:, None]
    return jnp.min(jnp.where(true, index, true.shape[-2] - 1), -2)
