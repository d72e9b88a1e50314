"""Low-rank adapters over frozen kernels (LoRA, arXiv 2106.09685): the adapted kernel, and where a decoder has some."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jquant.errors import InputError
from jquant.qtensor import QTensor, dequantize


@dataclass(frozen=True)
class LoRA:
    """The adapter of a weight W `[in, out]`: x @ W becomes x @ W + (alpha / rank) · dropout(x) @ a @ b.

    Attributes:
      rank: columns of a and rows of b.
      alpha: the adapter's strength is alpha / rank.
      dropout: share of the inputs of `a` that each training step sets to 0; the others are divided by 1 − dropout.
      start: "zero" is PEFT's: a is uniform within ±1/√in and b is 0, so the model is unchanged. "loftq": a and b make
        up for the error of the quantized weight, which stays as it is: LoftQ with T = 1 (arXiv 2310.08659,
        Algorithm 1).

    Raises:
      InputError: an option out of range.
    """

    rank: int = 16
    alpha: int | float = 32
    dropout: int | float = 0.0
    start: Literal["zero", "loftq"] = "zero"

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:  # a bool is no number
            raise InputError(f"LoRA takes a rank that is a whole number from 1, not {self.rank!r}.")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < math.inf:
            raise InputError(f"LoRA takes a finite alpha above 0, not {self.alpha!r}.")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise InputError(f"LoRA takes a dropout from 0 to below 1, not {self.dropout!r}.")
        if self.start not in ("zero", "loftq"):
            raise InputError(f'LoRA takes start="zero" or "loftq", not {self.start!r}.')


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """A frozen kernel with an adapter; `x @ kernel` is x @ base + scale · dropout(x) @ a @ b.

    Attributes:
      base: the frozen kernel, an array or a `QTensor`, `[*l, in, out]`.
      a: float32 `[*l, in, rank]`.
      b: float32 `[*l, rank, out]`.
      alpha: see `LoRA` (static).
      dropout: see `LoRA` (static).
      keys: the step's random keys of dropout, one for each of the inputs' windows, `[*l, windows]`; without them
        nothing is dropped.
    """

    # Fields are Any because pytree transformations put shapes, shardings or None in place of arrays.
    base: Any
    a: Any
    b: Any
    alpha: int | float = field(metadata={"static": True})
    dropout: int | float = field(default=0.0, metadata={"static": True})
    keys: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, `[*l, in, out]`."""
        return tuple(self.base.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of base and adapter together."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def rank(self) -> int:
        """Columns of a."""
        return self.a.shape[-1]

    @property
    def scale(self) -> float:
        """The adapter's strength."""
        return self.alpha / self.rank

    __array_ufunc__ = None  # makes NumPy arrays leave x @ kernel to the method below

    def __rmatmul__(self, x: Float[Array | np.ndarray, "*b in"]) -> Float[Array, "*b out"]:
        """x @ self in the dtype of x @ base; the adapter's products are computed in float32."""
        x = jnp.asarray(x)
        y = x @ self.base
        kept = x.astype(jnp.float32)
        if self.keys is not None and self.dropout:
            kept = drop(kept, self.keys, self.dropout)
        return y + (self.scale * (kept @ self.a @ self.b)).astype(y.dtype)

    def merged(self) -> Float[Array, "*l in out"]:
        """Its values in float32: base + scale · a @ b."""
        return values_of(self.base) + self.scale * jnp.matmul(self.a, self.b, precision="highest")


def drop(x: Float[Array, "*b in"], keys: Any, share: int | float) -> Float[Array, "*b in"]:
    """Sets a share of each window x[i] to 0, drawn from keys[i], and divides the other values by 1 − share."""
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - share, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - share), 0)


def values_of(kernel: Any) -> Float[Array, "*l in out"]:
    """The float32 values of a kernel: an array, a `QTensor`, or an `Adapted` one."""
    if isinstance(kernel, Adapted):
        return kernel.merged()
    return dequantize(kernel) if isinstance(kernel, QTensor) else kernel.astype(jnp.float32)


def first_adapted(params: Mapping[str, Any]) -> str | None:
    """The name of the first adapted kernel among parameters; None if there is none."""
    return next((name for name, leaf in params.items() if isinstance(leaf, Adapted)), None)
