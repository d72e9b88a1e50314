"""Key/value cache for generation, and its rounding."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.activations import Activation, fake_quant_inputs
from jquant.errors import InputError
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


@dataclass(frozen=True)
class RoundedCache:
    """The formats that attention rounds keys and values to before anything reads them; codes are not packed.

    A head's keys (or values) of one token are rounded like a layer's inputs: Activation's format with group "channel"
    gives them one scale, a number one for each run of so many channels. Keys are rounded after the rotary embedding.

    Attributes:
      keys: None keeps keys as they are.
      values: None keeps values as they are.
    """

    keys: Any = None  # checked here, not by the type
    values: Any = None

    def __post_init__(self) -> None:
        for name, activation in (("keys", self.keys), ("values", self.values)):
            if activation is None:
                continue
            if not isinstance(activation, Activation):
                raise InputError(f"A cache's {name} take an Activation(format), not {activation!r}.")
            own = activation.format.group == "channel" or isinstance(activation.format.group, int)
            if activation.static or activation.outliers is not None or not own:
                raise InputError(
                    f"A cache's {name} have scales of their own for each token and no outliers: an Activation whose "
                    f'format has the group "channel" or a number of channels, not {activation}.'
                )

    def __call__(
        self, keys: Float[Array, "b h t d"], values: Float[Array, "b h t d"]
    ) -> tuple[Float[Array, "b h t d"], Float[Array, "b h t d"]]:
        """Rounded keys and values; gradients pass straight through."""
        pairs = ((keys, self.keys), (values, self.values))
        rounded = [x if activation is None else fake_quant_inputs(x, activation, None) for x, activation in pairs]
        return rounded[0], rounded[1]
