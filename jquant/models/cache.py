"""Key/value cache for generation."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jquant.models.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, and how many slots are filled.

    Attributes:
      layers: per layer (keys, values), each `[b, kv_heads, slots, head_dim]`. Buffers are separate, so that a
        jitted step to which they are donated writes one token in place.
      length: int32 scalar.
    """

    layers: Any
    length: Any

    @staticmethod
    def init(config: DecoderConfig, batch: int, slots: int, dtype: Any) -> "Cache":
        """An empty cache."""
        shape = (batch, config.kv_heads, slots, config.head_dim)
        layers = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers))
        return Cache(layers, jnp.int32(0))
