"""Attention of one query a head, in C++."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jquant.kernels.cpu.build import ATTEND, target

WIDEST = 16  # lanes; the width of heads is a multiple


def attend(
    q: Float[Array, "b h 1 d"], k: Float[Array, "b kv s d"], v: Float[Array, "b kv s d"], length: Int[Array, ""]
) -> Float[Array, "b h 1 d"]:
    """softmax(q kᵀ / √d) v over the first `length` slots, the only ones that are read; all float32."""
    return jax.ffi.ffi_call(f"{ATTEND}-{target()}", jax.ShapeDtypeStruct(q.shape, q.dtype))(
        q, k, v, jnp.asarray(length, jnp.int32)
    )
