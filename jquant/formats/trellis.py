"""Trellis codes (QTIP, arXiv 2406.11235): a weight's value depends on its own code and on the codes before it.

A tile of 16 × 16 weights is a sequence, a column after the other, that goes through 2^L states. Weight t shifts its k
bits into the state, and its value is a pseudo-random function of the state, of nearly normal distribution:

    state_t = (2^k · state_{t−1} + code_t) mod 2^L,    weight_t = scale · value(state_t)

The sequence is cyclic (tail-biting): the state before the first weight is what the last weights leave. So the codes
alone, k bits a weight, define all values. The best codes of a tile are the cheapest path through its states, which
Viterbi's algorithm finds.

State s is entered with the L − k high bits of s, and left with its L − k low bits. These L − k bits, which two states
in sequence share, are called an *overlap* here, as in the paper. The cheapest way to an overlap does not depend on the
code that follows, so a step compares the 2^k states that leave each of the 2^(L−k) overlaps.
"""

from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from statistics import NormalDist
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, UInt8

from jquant.errors import InputError
from jquant.formats.base import Format, Group, as_stored, check_group, check_scale, ratio, round_scale

Code = Literal["1mad", "3inst", "lut"]

# By bits: the values' root mean square, in that of the weights, at which the mean squared error of normal weights is
# least. Measured with L = 12, "3inst" and 131,072 weights. It is below 1 where the error is large, and above 1 where
# the weights' tail costs most.
SPREAD = {1: 0.88, 2: 1.02, 3: 1.09, 4: 1.15}

# Tiles that are encoded side by side, in the lanes of vectors. Their costs, at most 2^16 numbers where that leaves 16
# lanes, fit a core's second-level cache. With 64 lanes and 4 bits the costs that are compared lie 4,096 bytes apart and
# evict one another: twice the time.
LANES = 48
CACHED_COSTS = 2**16

UNREACHABLE = 1e30  # a cost above all others; not infinite, for its lowest bits are replaced


@dataclass(frozen=True)
class Trellis:
    """A trellis code over tiles of 16 × 16 weights: value = scale · value of the state, see the module.

    `in` and `out` of a weight are multiples of 16. Values are in standard deviations of normal weights, so the scale
    that suits these best is their root mean square.

    Attributes:
      bits: k, 1 to 4.
      group: weights that share a scale.
      scale: how the scale is stored. Codes minimise the squared error under the scale as stored; a tile's weights may
        have different scales.
      state_bits: L, from 2 · bits to 16. One more doubles the time of encoding. With 8, 12 and 16 the mean squared
        error of normal weights at 2 bits is 0.091, 0.073 and 0.068.
      code: how the state becomes a value. "1mad" and "3inst" compute it, by the paper's algorithms 1 and 2: a linear
        congruence, then the sum of its 4 bytes, or of two float16 made of its bits. "lut" takes it from a table: the
        normal distribution's quantiles in a random order, the same on every machine. "3inst" has the least error of
        normal weights at 1 and 2 bits; at 4 bits "1mad" has 5 % less. A table takes twice as long to decode on a CPU.
    """

    bits: int = 2
    group: Group = "channel"
    scale: str | Format = "float16"
    state_bits: int = 12
    code: Code = "3inst"

    tile: ClassVar[tuple[int, int]] = (16, 16)  # rows × columns

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= 4:
            raise InputError(f"Trellis takes 1 to 4 bits, not {self.bits!r}.")
        if type(self.state_bits) is not int or not 2 * self.bits <= self.state_bits <= 16:
            raise InputError(
                f"Trellis takes 2 · bits to 16 state bits, here {2 * self.bits} to 16, not {self.state_bits!r}."
            )
        if self.code not in get_args(Code):
            raise InputError(f'Trellis takes code="1mad", "3inst" or "lut", not {self.code!r}.')
        check_group(self.group)
        check_scale(self.scale)

    @property
    def has_zero(self) -> bool:
        """False: values lie on both sides of 0."""
        return False

    @property
    def values(self) -> Float[np.ndarray, " states"]:
        """Value of every state, float32, in standard deviations of the weights."""
        return _values(self.bits, self.state_bits, self.code)

    @property
    def deviations(self) -> float:
        """The largest absolute value: how many standard deviations a range's farther end lies from 0."""
        return float(np.abs(self.values).max())

    def grid(self, low: Array, high: Array) -> tuple[Array, Array | None]:
        """See `Format.grid`: scale = max(−low, high) / `deviations`.

        So a range with its ends at `deviations` times the root mean square gives the scale that has the least error on
        normal weights, and a range with its ends at the outermost weights gives values that reach them.
        """
        scale = jnp.maximum(-low, high).astype(jnp.float32) / self.deviations
        return round_scale(scale, self.scale) if isinstance(self.scale, str) else scale, None

    def encode(self, w: Array, scale: Array, zero: Array | None) -> UInt8[Array, "*l in out"]:
        """Codes that minimise each tile's Σ (w − scale · value)², with `scale` as stored; all arguments broadcast.

        As in the paper's algorithm 4, Viterbi's algorithm runs twice: on the sequence rotated by half, which gives the
        overlap where the sequence's ends meet, and on the sequence with that overlap before it and after it. Given the
        overlap, the codes are optimal up to float rounding. The time is that of 2 · 2^L steps a weight; the memory
        384 · 2^(L−k) bytes a tile for 16 to 48 tiles at a time, 20 MB by default.

        Raises:
          InputError: `in` or `out` is not a multiple of 16.
        """
        w, scale = jnp.broadcast_arrays(w.astype(jnp.float32), as_stored(scale, self.scale))
        _check_shape(w.shape)
        codes = _encode_tiles(_tiles(ratio(w, scale)), _tiles(scale), self.values, self.bits)
        return _untiled(codes, w.shape)

    def decode(self, codes: Array, scale: Array, zero: Array | None) -> Float[Array, "*l in out"]:
        """See `Format.decode`.

        Raises:
          InputError: `in` or `out` is not a multiple of 16.
        """
        _check_shape(codes.shape)
        states = _states(codes, self.bits, self.state_bits)
        if self.code == "lut":
            values = jnp.asarray(self.values)[states]
        else:
            values = _computed(states, self.code) * _gain(self.bits, self.state_bits, self.code)
        return values * as_stored(scale, self.scale)


def _check_shape(shape: tuple[int, ...]) -> None:
    rows, columns = Trellis.tile
    if len(shape) < 2 or shape[-2] % rows or shape[-1] % columns:
        raise InputError(f"Trellis takes matrices of whole tiles of {rows} × {columns} weights; this one is {shape}.")


# --------------------------------------------------------------------------------------------------------- values


def _computed(states: Any, code: Code) -> Any:
    """Values of uint32 states, float32, before normalisation; of NumPy's arrays or jax's."""
    if code == "1mad":
        x = states * np.uint32(34038481) + np.uint32(76625530)
        pairs = (x & np.uint32(0x00FF00FF)) + ((x >> 8) & np.uint32(0x00FF00FF))  # two sums of two bytes
        total = (pairs & np.uint32(0xFFFF)) + (pairs >> 16)
        return total.astype(np.int32).astype(np.float32) - np.float32(510)
    x = states * np.uint32(89226354) + np.uint32(64248484)
    # The paper takes x & 0x8fff8fff ^ 0x3b603b60 as two float16. Their exponents lie between −3 and 0, so a float32 has
    # the same sign, low two bits of the exponent and mantissa; with 0 in these it is 0x3b60, 0.921875.
    low = (x & np.uint32(0x8000)) << 16 | (x & np.uint32(0x0FFF)) << 13
    high = x & np.uint32(0x80000000) | x >> 3 & np.uint32(0x0FFF << 13)
    offset = np.float32(0.921875).view(np.uint32)
    return (low ^ offset).view(np.float32) + (high ^ offset).view(np.float32)


@lru_cache
def _raw(state_bits: int, code: Code) -> Float[np.ndarray, " states"]:
    states = np.arange(2**state_bits, dtype=np.uint32)
    if code != "lut":
        return _computed(states, code)
    # The order is that of the generator's raw bits, whose stream NumPy never changes (NEP 19).
    order = np.argsort(np.random.PCG64(0).random_raw(len(states)), kind="stable")
    quantile = NormalDist().inv_cdf
    return np.array([quantile((rank + 0.5) / len(states)) for rank in order], np.float32)


@lru_cache
def _gain(bits: int, state_bits: int, code: Code) -> np.float32:
    """What brings the values' root mean square to SPREAD."""
    raw = _raw(state_bits, code).astype(np.float64)
    return np.float32(SPREAD[bits] / np.sqrt(np.mean(raw**2)))


@lru_cache
def _values(bits: int, state_bits: int, code: Code) -> Float[np.ndarray, " states"]:
    values = _raw(state_bits, code) * _gain(bits, state_bits, code)
    values.flags.writeable = False
    return values


def _states(codes: UInt8[Array, "*l in out"], bits: int, state_bits: int) -> Array:
    """The uint32 state of every weight: its code and those before it, of the rows above and of the column before.

    A weight's column stays where it is, so that vectors run along `out`.
    """
    rows, columns = Trellis.tile
    *lead, n, out = codes.shape
    tiles = codes.reshape(*lead, n // rows, rows, out // columns, columns)
    before = -(-state_bits // bits) - 1  # at most 15, so all lie in this column and the one before
    bottom = jnp.roll(tiles[..., rows - before :, :, :], 1, axis=-1)
    extended = jnp.concatenate([bottom, tiles], axis=-3)
    states = jnp.zeros(tiles.shape, jnp.uint32)
    for age in range(before + 1):
        start = before - age
        states |= extended[..., start : start + rows, :, :].astype(jnp.uint32) << (bits * age)
    return (states & (2**state_bits - 1)).reshape(codes.shape)


# ------------------------------------------------------------------------------------------------------- encoding


def _tiles(w: Float[Array, "*l in out"]) -> Float[Array, "tiles weights"]:
    """Every tile's weights in the order of the sequence. Tiles of a column are neighbours, so `out` may be sharded."""
    rows, columns = Trellis.tile
    *_, n, out = w.shape
    w = w.reshape(-1, n // rows, rows, out // columns, columns)
    return w.transpose(3, 0, 1, 4, 2).reshape(-1, rows * columns)


def _untiled(tiles: UInt8[Array, "tiles weights"], shape: tuple[int, ...]) -> UInt8[Array, "*l in out"]:
    """The inverse of `_tiles`, for a weight of that shape."""
    rows, columns = Trellis.tile
    *_, n, out = shape
    tiles = tiles.reshape(out // columns, -1, n // rows, columns, rows)
    return tiles.transpose(1, 2, 4, 0, 3).reshape(shape)


class Sequences(NamedTuple):
    """What values cost at each weight of some tiles: d · (weight · d + slope) with d = value − nearest.

    That is weight · (x − value)² less its least, for the target x = w / scale; so the sum of an outlier's tile keeps
    its precision. `nearest` is x within the values' range, weight = scale², slope = 2 · weight · (nearest − x).
    """

    nearest: Float[Array, "n lanes"]
    weight: Float[Array, "n lanes"]
    slope: Float[Array, "n lanes"]


def _sequences(
    x: Float[Array, "n lanes"], scale: Float[Array, "n lanes"], values: Float[Array, " states"]
) -> Sequences:
    most = jnp.max(jnp.abs(scale), axis=0)
    weight = (scale / jnp.where(most == 0, 1, most)) ** 2  # of at most 1, whatever the scale
    x = jnp.clip(x, -(2.0**20), 2.0**20)  # nor do costs overflow
    nearest = jnp.clip(x, jnp.min(values), jnp.max(values))
    return Sequences(nearest, weight, 2 * weight * (nearest - x))


@partial(jax.jit, static_argnames="bits")
def _encode_tiles(
    x: Float[Array, "tiles weights"], scale: Float[Array, "tiles weights"], values: Float[Array, " states"], bits: int
) -> UInt8[Array, "tiles weights"]:
    """Codes of tiles with the targets x = w / scale, some tiles at a time."""
    tiles, n = x.shape
    most = max(16, min(LANES, (CACHED_COSTS << bits) // len(values)))
    chunks = -(-tiles // most)
    lanes = 8 * -(-tiles // (8 * chunks))

    def chunked(v: Array) -> Array:
        v = jnp.pad(v, ((0, lanes * chunks - tiles), (0, 0)))
        # A lane takes neighbours one after the other, so that lanes are sharded as the tiles are.
        return v.reshape(lanes, chunks, n).transpose(1, 2, 0)

    def encode(chunk: tuple[Array, Array]) -> Array:
        return _tail_biting(_sequences(*chunk, values), values, bits)

    codes = jax.lax.map(encode, (chunked(x), chunked(scale)))
    return codes.transpose(2, 0, 1).reshape(lanes * chunks, n)[:tiles]


def _tail_biting(sequences: Sequences, values: Float[Array, " states"], bits: int) -> UInt8[Array, "n lanes"]:
    """Codes of a cyclic path of each lane, the cheapest in most cases; see `Trellis.encode`."""
    half = len(sequences.weight) // 2
    overlaps, lanes = len(values) >> bits, sequences.weight.shape[1]
    first, second = jax.tree.map(lambda v: v[:half], sequences), jax.tree.map(lambda v: v[half:], sequences)
    cost, _ = _forward(jnp.zeros((overlaps, lanes), jnp.float32), second, values, bits)
    cost, choices = _forward(cost, first, values, bits)
    shared, _ = _backward(jnp.argmin(cost, axis=0), cost, choices, bits)
    start = jnp.where(jnp.arange(overlaps)[:, None] == shared, jnp.float32(0), jnp.float32(UNREACHABLE))
    cost, choices = _forward(start, sequences, values, bits)
    return _backward(shared, cost, choices, bits)[1]


def _forward(
    cost: Float[Array, "overlaps lanes"], sequences: Sequences, values: Float[Array, " states"], bits: int
) -> tuple[Float[Array, "overlaps lanes"], UInt8[Array, "n overlaps lanes"]]:
    """Cost of the cheapest path that ends in each overlap, and each weight's choices.

    `cost` is that of starting with each overlap. A choice is the high `bits` j of the cheapest state that leaves the
    overlap u, of the states j · overlaps + u. It takes the place of a cost's lowest bits, so that one minimum gives
    both; the choices of row t are those of weight t − 1, and the last weight's are in the final costs. (XLA would
    compute a choice and a cost of the same step twice, as two programs.)
    """
    shape, leaving = cost.shape, 2**bits
    levels = values.reshape(leaving, -1, leaving, 1)

    def step(cost: Array, at: Sequences) -> tuple[Array, Array]:
        packed = []
        # By overlap, the state without its code.
        for j, (level, entered) in enumerate(zip(levels, cost.reshape(leaving, -1, 1, shape[1]), strict=True)):
            d = level - at.nearest
            total = entered + d * (d * at.weight + at.slope)
            packed.append(_bits(total) & -leaving | j)
        # Costs are not negative, so their bits are in the same order.
        best = reduce(jnp.minimum, packed).reshape(shape)
        return jax.lax.bitcast_convert_type(best, jnp.float32), _choices(cost, bits)

    return jax.lax.scan(step, cost, sequences)


def _backward(
    overlap: Int[Array, " lanes"],
    cost: Float[Array, "overlaps lanes"],
    choices: UInt8[Array, "n overlaps lanes"],
    bits: int,
) -> tuple[Int[Array, " lanes"], UInt8[Array, "n lanes"]]:
    """The overlap before the first weight, and the codes, of the cheapest path that ends in `overlap`."""
    overlaps = len(cost)

    def left(overlap: Array, choices: Array) -> Array:
        high = jnp.take_along_axis(choices, overlap[None], axis=0, mode="promise_in_bounds")[0]
        return high.astype(jnp.int32) * overlaps + overlap

    def step(state: Array, choices: Array) -> tuple[Array, Array]:
        return left(state >> bits, choices), (state & (2**bits - 1)).astype(jnp.uint8)

    state, codes = jax.lax.scan(step, left(overlap, _choices(cost, bits)), choices, reverse=True)
    return state & (overlaps - 1), codes


def _bits(cost: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    return jax.lax.bitcast_convert_type(cost, jnp.int32)


def _choices(cost: Float[Array, "overlaps lanes"], bits: int) -> UInt8[Array, "overlaps lanes"]:
    return (_bits(cost) & (2**bits - 1)).astype(jnp.uint8)
