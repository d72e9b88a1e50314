"""What learning brings down, and whether it stayed finite."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int


def next_token_loss(logits: Float[Array, "b t vocab"], tokens: Int[Array, "b t"]) -> Float[Array, ""]:
    """Mean cross-entropy of each token under the logits before it, nats."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), tokens[:, 1:])
    return jnp.mean(losses)


@jax.jit
def all_finite(tree: Any) -> Array:
    """Whether every number of a tree's arrays is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
