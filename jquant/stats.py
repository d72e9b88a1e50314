"""What a layer's inputs looked like: monoids with init, observe and merge.

Merging is associative, so batches, hosts and devices (a psum over the leaves) all combine the same way. Everything is
accumulated in float32 at the highest matrix-product precision, whatever the activations' dtype: a Gram matrix of
bfloat16 products is not positive definite.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.errors import InputError


def check_gram(gram: Array | None, w: Array) -> None:
    """Raises InputError unless a Gram matrix, where there is one, has the weight's inputs on both sides."""
    if gram is not None and gram.shape != (w.shape[-2], w.shape[-2]):
        raise InputError(f"A Gram matrix of shape {gram.shape} does not belong to a weight of shape {w.shape}.")


@runtime_checkable
class Statistic(Protocol):
    """The contract of every statistic: a frozen dataclass that is a pytree of float32 arrays.

    A part that names the class in its `needs` is given `value` under `name`. Tokens count by `Method.token_weights`.
    """

    name: ClassVar[str]

    @staticmethod
    def init(in_features: int) -> Any:
        """Nothing seen yet, of inputs with so many features."""
        ...

    def observe(self, x: Float[Array, "*b in"], weight: Float[Array, "*b"] | None = None) -> Any:
        """Adds tokens; `weight` says how much each one counts (1 by default)."""
        ...

    def merge(self, other: Any) -> Any:
        """Both together, array by array and element by element: devices merge pieces of the arrays."""
        ...

    def scaled(self, factor: Float[Array, " in"]) -> Any:
        """What would have been seen, had the features been multiplied by `factor`."""
        ...

    @property
    def value(self) -> Any:
        """What parts are given."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gram:
    """Σₜ wₜ xₜ xₜᵀ over tokens t, and Σₜ wₜ.

    Attributes:
      total: float32 `[in, in]`.
      weight: float32 scalar; None where `total` is the mean.
    """

    name: ClassVar[str] = "gram"
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

    def scaled(self, factor: Float[Array, " in"]) -> "Gram":
        """What would have been seen, had the features been multiplied by `factor`."""
        return replace(self, total=self.total * factor[:, None] * factor)

    @property
    def value(self) -> Float[Array, "in in"]:
        """The weighted mean of x xᵀ."""
        return self.total if self.weight is None else self.total / jnp.maximum(self.weight, 1e-30)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cross:
    """Σₜ wₜ x̃ₜ (xₜ − x̃ₜ)ᵀ over tokens t, and Σₜ wₜ: how a layer's inputs x̃ lag behind the float model's x.

    Attributes:
      total: float32 `[in, in]`.
      weight: float32 scalar.
    """

    name: ClassVar[str] = "cross"
    total: Any
    weight: Any

    @staticmethod
    def init(in_features: int) -> "Cross":
        """Nothing seen yet."""
        return Cross(jnp.zeros((in_features, in_features), jnp.float32), jnp.float32(0))

    def observe(
        self, x: Float[Array, "*b in"], exact: Float[Array, "*b in"], weight: Float[Array, "*b"] | None = None
    ) -> "Cross":
        """Adds tokens as seen, `x`, and as the float model sees them, `exact`; `weight` as in `Gram`."""
        x, exact = (a.reshape(-1, a.shape[-1]).astype(jnp.float32) for a in (x, exact))
        w = jnp.ones(x.shape[0], jnp.float32) if weight is None else weight.reshape(-1).astype(jnp.float32)
        weighted = x if weight is None else x * w[:, None]
        return Cross(self.total + jnp.matmul(weighted.T, exact - x, precision="highest"), self.weight + jnp.sum(w))

    def merge(self, other: "Cross") -> "Cross":
        """Both together."""
        return jax.tree.map(jnp.add, self, other)

    def scaled(self, factor: Float[Array, " in"]) -> "Cross":
        """What would have been seen, had the features been multiplied by `factor`."""
        return replace(self, total=self.total * factor[:, None] * factor)

    @property
    def value(self) -> Float[Array, "in in"]:
        """The weighted mean of x̃ (x − x̃)ᵀ."""
        return self.total / jnp.maximum(self.weight, 1e-30)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AbsMean:
    """Σₜ |xₜ| over tokens t, and their number: the activation magnitude AWQ scales by.

    Attributes:
      total: float32 `[in]`.
      count: float32 scalar.
    """

    name: ClassVar[str] = "abs_mean"
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

    def scaled(self, factor: Float[Array, " in"]) -> "AbsMean":
        """What would have been seen, had the features been multiplied by `factor`."""
        return replace(self, total=self.total * jnp.abs(factor))

    @property
    def value(self) -> Float[Array, " in"]:
        """The weighted mean of |x|."""
        return self.total / jnp.maximum(self.count, 1e-30)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AbsMax:
    """max |x| over tokens, feature by feature: what SmoothQuant and static activation scales are made of.

    Attributes:
      largest: float32 `[in]`.
    """

    name: ClassVar[str] = "abs_max"
    largest: Any

    @staticmethod
    def init(in_features: int) -> "AbsMax":
        """Nothing seen yet."""
        return AbsMax(jnp.zeros(in_features, jnp.float32))

    def observe(self, x: Float[Array, "*b in"], weight: Float[Array, "*b"] | None = None) -> "AbsMax":
        """Adds tokens; a token of any positive weight counts."""
        size = jnp.abs(x.astype(jnp.float32))
        size = size if weight is None else size * (weight > 0)[..., None]
        return AbsMax(jnp.maximum(self.largest, jnp.max(size.reshape(-1, x.shape[-1]), 0)))

    def merge(self, other: "AbsMax") -> "AbsMax":
        """Both together."""
        return jax.tree.map(jnp.maximum, self, other)

    def scaled(self, factor: Float[Array, " in"]) -> "AbsMax":
        """What would have been seen, had the features been multiplied by `factor`."""
        return replace(self, largest=self.largest * jnp.abs(factor))

    @property
    def value(self) -> Float[Array, " in"]:
        """max |x|."""
        return self.largest


# The statistics that a need names by a word, those of held-out windows among them.
BUILT_IN: dict[str, Any] = {"gram": Gram, "held_out": Gram, "cross": Cross, "abs_mean": AbsMean, "abs_max": AbsMax}
