"""Rotary position embeddings (RoPE, arXiv 2104.09864)."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jquant.models.config import DecoderConfig, Rope


def rotary_table(config: DecoderConfig, positions: Int[Array, " t"]) -> Float[Array, "ropes t half 2"]:
    """Cosine and sine of each position and frequency pair, float32, times the magnitude; one table for each rope."""
    return jnp.stack([_table(rope, config.rotary_channels // 2, positions) for rope in config.ropes])


def _table(rope: Rope, half: int, positions: Int[Array, " t"]) -> Float[Array, "t half 2"]:
    frequency = rope.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if rope.divisors is not None:
        frequency = frequency / jnp.asarray(rope.divisors, jnp.float32)
    angle = positions[:, None].astype(jnp.float32) * frequency
    turned = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    return turned if rope.magnitude == 1 else turned * rope.magnitude


def rotate(x: Float[Array, "b h t d"], rotary: Float[Array, "t half 2"] | None) -> Float[Array, "b h t d"]:
    """Rotates the pairs (i, i + half), Hugging Face's order, in float32; None leaves x as it is.

    Channels from 2 · half on stay as they are.
    """
    if rotary is None:
        return x
    turned = 2 * rotary.shape[-2]
    if turned < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :turned], rotary), x[..., turned:]], -1)
    cos, sin = rotary[..., 0], rotary[..., 1]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
