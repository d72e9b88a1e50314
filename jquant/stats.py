"""Statistics of a layer's inputs: monoids with init, observe and merge.

Merging is associative, so batches, hosts and devices combine in the same way. All sums are float32 at the highest
matrix-product precision, whatever the activations' dtype: a Gram matrix of bfloat16 products is not positive definite.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.errors import InputError


def check_gram(gram: Array | None, w: Array) -> None:
    """Raises InputError for a Gram matrix, if there is one, that is not `[in, in]` for the weight."""
    if gram is not None and gram.shape != (w.shape[-2], w.shape[-2]):
        raise InputError(f"A Gram matrix of shape {gram.shape} does not belong to a weight of shape {w.shape}.")


@runtime_checkable
class Statistic(Protocol):
    """The contract of every statistic: a frozen dataclass that is a pytree of float32 arrays.

    A part with the class in its `needs` gets `value` as the keyword `name`. `Method.token_weights` weights the tokens.
    """

    name: ClassVar[str]

    @staticmethod
    def init(in_features: int) -> Any:
        """The empty statistic of inputs with so many features."""
        ...

    def observe(self, x: Float[Array, "*b in"], weight: Float[Array, "*b"] | None = None) -> Any:
        """Adds tokens; `weight` is the weight of each (1 by default)."""
        ...

    def merge(self, other: Any) -> Any:
        """Two statistics merged. It must work element by element: devices merge pieces of the arrays."""
        ...

    def scaled(self, factor: Float[Array, " in"]) -> Any:
        """The statistic of inputs whose features are multiplied by `factor`."""
        ...

    @property
    def value(self) -> Any:
        """What parts get."""
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
        """The empty statistic."""
        return Gram(jnp.zeros((in_features, in_features), jnp.float32), jnp.float32(0))

    def observe(self, x: Float[Array, "*b in"], weight: Float[Array, "*b"] | None = None) -> "Gram":
        """Adds tokens; `weight` is the weight of each (1 by default)."""
        x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        w = jnp.ones(x.shape[0], jnp.float32) if weight is None else weight.reshape(-1).astype(jnp.float32)
        weighted = x if weight is None else x * w[:, None]
        return Gram(self.total + jnp.matmul(weighted.T, x, precision="highest"), self.weight + jnp.sum(w))

    def merge(self, other: "Gram") -> "Gram":
        """Two statistics merged."""
        return jax.tree.map(jnp.add, self, other)

    def scaled(self, factor: Float[Array, " in"]) -> "Gram":
        """The statistic of inputs whose features are multiplied by `factor`."""
        return replace(self, total=self.total * factor[:, None] * factor)

    @property
    def value(self) -> Float[Array, "in in"]:
        """The weighted mean of x xᵀ."""
        return self.total if self.weight is None else self.total / jnp.maximum(self.weight, 1e-30)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cross:
    """Σₜ wₜ x̃ₜ (xₜ − x̃ₜ)ᵀ over tokens t, and Σₜ wₜ: how a layer's inputs x̃ differ from the float model's x.

    Attributes:
      total: float32 `[in, in]`.
      weight: float32 scalar.
    """

    name: ClassVar[str] = "cross"
    total: Any
    weight: Any

    @staticmethod
    def init(in_features: int) -> "Cross":
        """The empty statistic."""
        return Cross(jnp.zeros((in_features, in_features), jnp.float32), jnp.float32(0))

    def observe(
        self, x: Float[Array, "*b in"], exact: Float[Array, "*b in"], weight: Float[Array, "*b"] | None = None
    ) -> "Cross":
        """Adds tokens: inputs `x`, and the float model's inputs `exact`; `weight` as in `Gram`."""
        x, exact = (a.reshape(-1, a.shape[-1]).astype(jnp.float32) for a in (x, exact))
        w = jnp.ones(x.shape[0], jnp.float32) if weight is None else weight.reshape(-1).astype(jnp.float32)
        weighted = x if weight is None else x * w[:, None]
        return Cross(self.total + jnp.matmul(weighted.T, exact - x, precision="highest"), self.weight + jnp.sum(w))

    def merge(self, other: "Cross") -> "Cross":
        """Two statistics merged."""
        return jax.tree.map(jnp.add, self, other)

    def scaled(self, factor: Float[Array, " in"]) -> "Cross":
        """The statistic of inputs whose features are multiplied by `factor`."""
        return replace(self, total=self.total * factor[:, None] * factor)

    @property
    def value(self) -> Float[Array, "in in"]:
        """The weighted mean of x̃ (x − x̃)ᵀ."""
        return self.total / jnp.maximum(self.weight, 1e-30)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AbsMean:
    """Σₜ `|xₜ|` over tokens t, and their number: AWQ scales by this magnitude.

    Attributes:
      total: float32 `[in]`.
      count: float32 scalar.
    """

    name: ClassVar[str] = "abs_mean"
    total: Any
    count: Any

    @staticmethod
    def init(in_features: int) -> "AbsMean":
        """The empty statistic."""
        return AbsMean(jnp.zeros(in_features, jnp.float32), jnp.float32(0))

    def observe(self, x: Float[Array, "*b in"], weight: Float[Array, "*b"] | None = None) -> "AbsMean":
        """Adds tokens; `weight` is the weight of each (1 by default)."""
        x = jnp.abs(x.reshape(-1, x.shape[-1]).astype(jnp.float32))
        w = jnp.ones(x.shape[0], jnp.float32) if weight is None else weight.reshape(-1).astype(jnp.float32)
        return AbsMean(self.total + jnp.matmul(w, x, precision="highest"), self.count + jnp.sum(w))

    def merge(self, other: "AbsMean") -> "AbsMean":
        """Two statistics merged."""
        return jax.tree.map(jnp.add, self, other)

    def scaled(self, factor: Float[Array, " in"]) -> "AbsMean":
        """The statistic of inputs whose features are multiplied by `factor`."""
        return replace(self, total=self.total * jnp.abs(factor))

    @property
    def value(self) -> Float[Array, " in"]:
        """The weighted mean of `|x|`."""
        return self.total / jnp.maximum(self.count, 1e-30)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AbsMax:
    """`max |x|` over tokens, by feature, for SmoothQuant and static activation scales.

    Attributes:
      largest: float32 `[in]`.
    """

    name: ClassVar[str] = "abs_max"
    largest: Any

    @staticmethod
    def init(in_features: int) -> "AbsMax":
        """The empty statistic."""
        return AbsMax(jnp.zeros(in_features, jnp.float32))

    def observe(self, x: Float[Array, "*b in"], weight: Float[Array, "*b"] | None = None) -> "AbsMax":
        """Adds tokens; a token of any positive weight counts."""
        size = jnp.abs(x.astype(jnp.float32))
        size = size if weight is None else size * (weight > 0)[..., None]
        return AbsMax(jnp.maximum(self.largest, jnp.max(size.reshape(-1, x.shape[-1]), 0)))

    def merge(self, other: "AbsMax") -> "AbsMax":
        """Two statistics merged."""
        return jax.tree.map(jnp.maximum, self, other)

    def scaled(self, factor: Float[Array, " in"]) -> "AbsMax":
        """The statistic of inputs whose features are multiplied by `factor`."""
        return replace(self, largest=self.largest * jnp.abs(factor))

    @property
    def value(self) -> Float[Array, " in"]:
        """`max |x|`."""
        return self.largest


# The statistics that `needs` names by a string. "held_out" is the Gram matrix of held-out windows, "output_gram" that
# of the loss's gradients at a weight's outputs.
BUILT_IN: dict[str, Any] = {
    "gram": Gram,
    "held_out": Gram,
    "output_gram": Gram,
    "cross": Cross,
    "abs_mean": AbsMean,
    "abs_max": AbsMax,
}
