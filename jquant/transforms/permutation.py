"""Orders of channels that put similar channels into the same group, so that one scale suits them all.

A group's step is set by its largest weight, so one large row costs the small rows in its group their precision. Sorted
rows share a group with similar rows. With the activations' magnitudes as keys this is GPTQ's act-order (arXiv
2210.17323, the authors' code) with groups that follow the order, at no cost when the model runs.
`jquant.permute_mlp` folds an order into a decoder.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def row_magnitude(weight: Float[Array, "*l in out"]) -> Float[Array, "*l in"]:
    """`max |w|` of each input channel's weights, float32."""
    return jnp.max(jnp.abs(weight.astype(jnp.float32)), -1)


def sort_channels(keys: Float[Array, "*l in"]) -> Int[Array, "*l in"]:
    """The channels from the smallest key to the largest; equal keys keep their order."""
    return jnp.argsort(keys, -1, stable=True)
