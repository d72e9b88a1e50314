"""What a layer's inputs looked like: monoids with init, observe and merge.

Merging is associative, so batches, hosts and devices (a psum over the leaves) all combine the same way. Everything is
accumulated in float32 at the highest matrix-product precision, whatever the activations' dtype: a Gram matrix of
bfloat16 products is not positive definite.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.errors import InputError


def check_gram(gram: Array | None, w: Array) -> None:
    """Raises InputError unless a Gram matrix, where there is one, has the weight's inputs on both sides."""
    if gram is not None and gram.shape != (w.shape[-2], w.shape[-2]):
        raise InputError(f"A Gram matrix of shape {gram.shape} does not belong to a weight of shape {w.shape}.")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gram:
    """Σₜ wₜ xₜ xₜᵀ over tokens t, and Σₜ wₜ.

    Attributes:
      total: float32 `[in, in]`.
      weight: float32 scalar.
    """

    total: Any
    weight: Any

    @staticmethod
    def init(in_features: int) -> "Gram":
        """Nothing seen yet."""
        return Gram(jnp.zeros((in_features, in_features), jnp.float32), jnp.float32(0))

    def observe(self, x: Float[Array, "*b in"], weight: Float[Array, "*b"] | None = None) -> "Gram":
        """Adds tokens; `weight` says how much each one counts (1 by default)."""
        x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        w = jnp.ones(x.shape[0], jnp.float32) if weight is None else weight.reshape(-1).astype(jnp.float32)
        weighted = x if weight is None else x * w[:, None]
        return Gram(self.total + jnp.matmul(weighted.T, x, precision="highest"), self.weight + jnp.sum(w))

    def merge(self, other: "Gram") -> "Gram":
        """Both together."""
        return jax.tree.map(jnp.add, self, other)

    @property
    def mean(self) -> Float[Array, "in in"]:
        """The weighted mean of x xᵀ."""
        return self.total / jnp.maximum(self.weight, 1e-30)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AbsMean:
    """Σₜ |xₜ| over tokens t, and their number: the activation magnitude AWQ scales by.

    Attributes:
      total: float32 `[in]`.
      count: float32 scalar.
    """

    total: Any
    count: Any

    @staticmethod
    def init(in_features: int) -> "AbsMean":
        """Nothing seen yet."""
        return AbsMean(jnp.zeros(in_features, jnp.float32), jnp.float32(0))

    def observe(self, x: Float[Array, "*b in"], weight: Float[Array, "*b"] | None = None) -> "AbsMean":
        """Adds tokens; `weight` says how much each one counts (1 by default)."""
        x = jnp.abs(x.reshape(-1, x.shape[-1]).astype(jnp.float32))
        w = jnp.ones(x.shape[0], jnp.float32) if weight is None else weight.reshape(-1).astype(jnp.float32)
        return AbsMean(self.total + jnp.matmul(w, x, precision="highest"), self.count + jnp.sum(w))

    def merge(self, other: "AbsMean") -> "AbsMean":
        """Both together."""
        return jax.tree.map(jnp.add, self, other)

    @property
    def mean(self) -> Float[Array, " in"]:
        """The weighted mean of |x|."""
        return self.total / jnp.maximum(self.count, 1e-30)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AbsMax:
    """max |x| over tokens and features: what a static activation scale is made of.

    Attributes:
      largest: float32 scalar.
    """

    largest: Any

    @staticmethod
    def init(in_features: int) -> "AbsMax":
        """Nothing seen yet."""
        return AbsMax(jnp.float32(0))

    def observe(self, x: Float[Array, "*b in"], weight: Float[Array, "*b"] | None = None) -> "AbsMax":
        """Adds tokens; a token of any positive weight counts."""
        size = jnp.abs(x.astype(jnp.float32))
        return AbsMax(jnp.maximum(self.largest, jnp.max(size if weight is None else size * (weight > 0)[..., None])))

    def merge(self, other: "AbsMax") -> "AbsMax":
        """Both together."""
        return jax.tree.map(jnp.maximum, self, other)
