"""The key/value cache: what generation keeps of past tokens, and what attention reads of it.

A `CacheFormat` rounds the past. Which tokens are past follows from their number alone, so that attention over a whole
text (evaluation, training, a prompt) reads for every query the same rounded keys and values as generation token by
token, which reads them from packed codes.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jquant.errors import InputError
from jquant.formats import Format, block_shape, grouped
from jquant.models.config import DecoderConfig
from jquant.models.rotary import rotary_table, rotate
from jquant.parts import brief
from jquant.qtensor import QTensor, dequantize, quantize
from jquant.rotations import Rotation, apply, apply_transpose

Heads = Float[Array, "b h t d"]


@dataclass(frozen=True)
class Stored:
    """How the keys, or the values, of past tokens are stored.

    Attributes:
      format: any format.
      axis: "token": each token's head is rounded by itself, in groups of channels. "channel": each channel is rounded
        over `format.group` tokens, once all of them are past (KIVI, arXiv 2402.02750, for keys).
      rotate: a Hadamard rotation of the head before rounding, undone when it is read.
    """

    # Fields are checked here, not by their types.
    format: Any
    axis: str = "token"
    rotate: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.format, Format):
            raise InputError(f"A cache stores a format, not {self.format!r}.")
        if hasattr(self.format, "own_levels"):
            raise InputError(f"A cache takes formats with one table for all, not {brief(self.format)}.")
        if self.axis not in ("token", "channel"):
            raise InputError(f'A cache rounds along axis="token" or "channel", not {self.axis!r}.')
        group = self.format.group
        own = isinstance(group, int) or (self.axis == "token" and group == "channel")
        if not own:
            raise InputError(
                f"A cache's scales are those of a number of channels of one token, or of tokens of one channel, not of "
                f'the group {group!r}: give its format a number, or "channel" for whole heads of a token.'
            )

    @property
    def block(self) -> int:
        """Tokens that are rounded together."""
        return 1 if self.axis == "token" else self.format.group

    def pack(self, x: Heads) -> QTensor:
        """The codes of whole blocks of tokens, `[b, h, blocks, …]`."""
        if self.rotate:
            x = apply(x.astype(jnp.float32), Rotation(x.shape[-1]))
        b, h, t, d = x.shape
        blocks = x[..., None] if self.axis == "token" else x.reshape(b, h, t // self.block, self.block, d)
        members = grouped(blocks, block_shape(self.format, blocks.shape))
        scale, zero = self.format.grid(jnp.min(members, -2), jnp.max(members, -2))
        return quantize(blocks, scale, zero, self.format)

    def unpack(self, q: QTensor) -> Heads:
        """What `pack` rounded to, float32."""
        values = dequantize(q)
        x = values[..., 0] if self.axis == "token" else values.reshape(*values.shape[:2], -1, values.shape[-1])
        return apply_transpose(x, Rotation(x.shape[-1])) if self.rotate else x


@dataclass(frozen=True)
class CacheFormat:
    """How generation keeps keys and values, and attention everywhere reads them.

    Attributes:
      keys: a `Stored`; None keeps them as they are.
      values: likewise.
      recent: the last so many tokens are not rounded, the query's own among them; 0 rounds that, too.
      first: neither are the first so many, where attention sinks are.
      before_rotary: keys are rounded before their rotary embedding, which is applied when they are read (KVQuant, arXiv
        2401.18079, §3.2).
    """

    keys: Any = None
    values: Any = None
    recent: int = 0
    first: int = 0
    before_rotary: bool = False

    def __post_init__(self) -> None:
        for name in ("keys", "values"):
            if not isinstance(getattr(self, name), Stored | None):
                raise InputError(f"A cache's {name} take a Stored(format) or None, not {getattr(self, name)!r}.")
        for name in ("recent", "first"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"A cache's {name} is a number of tokens from 0, not {value!r}.")

    def past(self, length: Any, stored: Stored) -> Any:
        """Of `length` tokens, those from `first` to this one are rounded: whole blocks before the recent tokens."""
        return self.first + (length - self.recent - self.first).clip(0) // stored.block * stored.block

    def in_text(self, x: Heads, stored: Stored | None) -> "Past | None":
        """Keys or values of a whole text as past tokens; None if they stay as they are."""
        if stored is None:
            return None
        t, fixed = x.shape[2], jax.lax.stop_gradient(x)
        body = fixed[:, :, self.first :]
        filled = jnp.pad(body, [(0, 0), (0, 0), (0, -body.shape[2] % stored.block), (0, 0)])
        rounded = stored.unpack(stored.pack(filled))[:, :, : body.shape[2]] if body.shape[2] else body
        # x - fixed is 0: the value is the rounded one to the last bit, the gradient that of x.
        rounded = jnp.concatenate([fixed[:, :, : self.first], rounded], 2).astype(x.dtype) + (x - fixed)
        past = self.past(np.arange(1, t + 1), stored)[:, None]
        return Past(rounded, (np.arange(t) >= self.first) & (np.arange(t) < past))


@dataclass(frozen=True)
class Past:
    """Keys or values of a text as they are read later.

    Attributes:
      rounded: `[b, h, t, d]`.
      reads: for each query and token, whether it reads the rounded one, `[t, t]`.
    """

    rounded: Heads
    reads: Bool[np.ndarray, "t t"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """Keys or values of one layer, packed.

    Attributes:
      packed: blocks of tokens from `CacheFormat.first` on, `[b, h, blocks, …]`.
      recent: the last tokens, that at position p in slot p mod slots, `[b, h, recent + block, d]`.
      first: `[b, h, first, d]`.
    """

    packed: Any
    recent: Any
    first: Any

    @staticmethod
    def init(like: jax.ShapeDtypeStruct, cached: CacheFormat, stored: Stored) -> "Kept":
        """Empty, for tokens of shape and dtype `like`, `[b, h, slots, d]`."""
        b, h, slots, d = like.shape
        some = lambda t: jax.ShapeDtypeStruct((b, h, t, d), like.dtype)  # noqa: E731
        whole = -(-max(slots - cached.first, 1) // stored.block) * stored.block
        shapes = (jax.eval_shape(stored.pack, some(whole)), some(cached.recent + stored.block), some(cached.first))
        return Kept(*jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype), shapes))

    def filled(self, x: Heads, cached: CacheFormat, stored: Stored) -> "Kept":
        """With the first tokens of a text."""
        t, slots = x.shape[2], self.recent.shape[2]
        last, packed = np.arange(max(t - slots, 0), t), self.packed
        if whole := max(t - cached.first, 0) // stored.block * stored.block:
            packed = _write(packed, stored.pack(x[:, :, cached.first : cached.first + whole]), 0)
        first = self.first.at[:, :, :t].set(x[:, :, : cached.first])
        return Kept(packed, self.recent.at[:, :, last % slots].set(x[:, :, last]), first)

    def appended(self, x: Heads, at: Int[Array, ""], cached: CacheFormat, stored: Stored) -> "Kept":
        """With one more token, at position `at`."""
        slots, block = self.recent.shape[2], stored.block
        recent = jax.lax.dynamic_update_slice_in_dim(self.recent, x, at % slots, 2)
        first = self.first
        if cached.first:
            first = first.at[:, :, jnp.where(at < cached.first, at, cached.first)].set(x[:, :, 0], mode="drop")
        begin, end = cached.past(at, stored), cached.past(at + 1, stored)
        index = (begin - cached.first) // block
        new = jax.lax.cond(
            end > begin,  # a block has become past
            lambda: stored.pack(recent[:, :, (begin + jnp.arange(block)) % slots]),
            lambda: jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, index, 1, 2), self.packed),
        )
        return Kept(_write(self.packed, new, index), recent, first)

    def read(self, length: Int[Array, ""], cached: CacheFormat, stored: Stored) -> Heads:
        """All slots, float32; those after `length` tokens mean nothing."""
        slots, last = self.recent.shape[2], length - 1
        past = stored.unpack(self.packed)
        whole = jnp.concatenate([self.first.astype(past.dtype), past], 2)
        if cached.recent == 0 and stored.block == 1:
            return whole
        positions = last - (last - jnp.arange(slots)) % slots
        fresh = positions >= jnp.maximum(cached.past(length, stored), cached.first)
        return whole.at[:, :, jnp.where(fresh, positions, whole.shape[2])].set(
            self.recent.astype(past.dtype), mode="drop"
        )


def _write(packed: QTensor, blocks: QTensor, index: Any) -> QTensor:
    """`packed` with `blocks` from block `index` on."""
    put = lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new.astype(a.dtype), index, 2)  # noqa: E731
    return jax.tree.map(put, packed, blocks)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, and how many tokens they are of.

    Attributes:
      layers: per layer (keys, values), each `[b, kv_heads, slots, head_dim]` or `Kept`. Buffers are separate, so that a
        jitted step to which they are donated writes one token in place.
      length: int32 scalar.
    """

    layers: Any
    length: Any

    @staticmethod
    def init(config: DecoderConfig, batch: int, slots: int, dtype: Any, cached: CacheFormat | None = None) -> "Cache":
        """An empty cache."""
        like = jax.ShapeDtypeStruct((batch, config.kv_heads, slots, config.head_dim), jnp.dtype(dtype))

        def empty(stored: Stored | None) -> Any:
            if stored is None or cached is None:
                return jnp.zeros(like.shape, like.dtype)
            return Kept.init(like, cached, stored)

        keys, values = (None, None) if cached is None else (cached.keys, cached.values)
        return Cache(tuple((empty(keys), empty(values)) for _ in range(config.layers)), jnp.int32(0))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.layers))


def extended(
    cache: tuple[Any, Any], new: tuple[Heads, Heads], rotary: Float[Array, "t half 2"] | None, start: Any, cached: Any
) -> tuple[Any, Any]:
    """One layer's keys and values with those of new tokens from position `start` on.

    Packed ones take a text's first tokens together, and every further token by itself.

    Args:
      cache: of this layer, as in `Cache.layers`.
      new: keys before their rotary embedding, and values.
      rotary: the new tokens' embedding, if there is one.
      start: position of the first of them.
      cached: a `CacheFormat`, or None.
    """
    keys, values = _as_cached(new[0], rotary, cached), new[1]
    if cached is None:
        return _written(cache[0], keys, start), _written(cache[1], values, start)

    def extend(kept: Any, x: Heads, stored: Stored | None) -> Any:
        if stored is None:
            return _written(kept, x, start)
        x = x.astype(kept.recent.dtype)
        if x.shape[2] > 1:
            return kept.filled(x, cached, stored)
        return kept.appended(x, jnp.asarray(start), cached, stored)

    return extend(cache[0], keys, cached.keys), extend(cache[1], values, cached.values)


def read(
    cache: tuple[Any, Any], length: Any, config: DecoderConfig, cached: Any, rope: int | None = 0
) -> tuple[Heads, Heads]:
    """One layer's keys, with their rotary embedding (`DecoderConfig.rope`), and values, of all slots."""
    if cached is None:
        return cache
    kinds = zip(cache, (cached.keys, cached.values), strict=True)
    keys, values = (kept if stored is None else kept.read(length, cached, stored) for kept, stored in kinds)
    slots = min(keys.shape[2], values.shape[2])  # whole blocks, of either size, reach beyond the last slot
    keys, values = keys[:, :, :slots], values[:, :, :slots]
    if cached.before_rotary and rope is not None:
        keys = rotate(keys, rotary_table(config, jnp.arange(slots))[rope])
    return keys, values


def rounded_past(
    k: Heads, v: Heads, rotary: Float[Array, "t half 2"] | None, cached: Any
) -> tuple["Past | None", "Past | None"]:
    """Keys and values of a whole text as past tokens, each None if they stay as they are; `k` as for `extended`."""
    if cached is None:
        return None, None
    keys = cached.in_text(_as_cached(k, rotary, cached), cached.keys)
    if keys is not None and cached.before_rotary:
        keys = Past(rotate(keys.rounded, rotary), keys.reads)
    return keys, cached.in_text(v, cached.values)


def _as_cached(k: Heads, rotary: Array | None, cached: Any) -> Heads:
    return k if cached is not None and cached.before_rotary else rotate(k, rotary)


def _written(kept: Array, x: Heads, start: Any) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(kept, x.astype(kept.dtype), start, 2)
