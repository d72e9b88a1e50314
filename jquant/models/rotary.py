"""Rotary position embeddings (RoPE, arXiv 2104.09864)."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jquant.models.config import DecoderConfig


def rotary_table(config: DecoderConfig, positions: Int[Array, " t"]) -> Float[Array, "t half 2"]:
    """Cosine and sine of each position and frequency pair, float32, times the magnitude."""
    half = config.head_dim // 2
    frequency = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_divisors is not None:
        frequency = frequency / jnp.asarray(config.rope_divisors, jnp.float32)
    angle = positions[:, None].astype(jnp.float32) * frequency
    turned = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    return turned if config.rope_magnitude == 1 else turned * config.rope_magnitude


def rotate(x: Float[Array, "b h t d"], rotary: Float[Array, "t half 2"]) -> Float[Array, "b h t d"]:
    """Rotates the pairs (i, i + d/2), Hugging Face's order, in float32."""
    cos, sin = rotary[..., 0], rotary[..., 1]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
