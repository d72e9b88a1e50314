"""Checks that a weight's scales fit their stored dtype."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from jquant.errors import InputError
from jquant.qtensor import QTensor

# If the largest scale is fewer subnormal steps of its dtype than this, it is off by more than 3 %, and smaller scales
# by more. Usual weights are far from that: in Q6_K, which has the smallest scales, weights from 0.004 on are fine.
STEPS = 16


def check_scales(weights: Mapping[str, QTensor], floats: Mapping[str, Array] | None = None) -> None:
    """Refuses weights whose scales, or float zeros, are lost in their stored dtype.

    Scales in 8-bit floats, and quantized scales, saturate by design: only their outermost dtype is checked.

    Args:
      weights: by name.
      floats: the weights before rounding, by the same names, if known: a matrix of zeros may have scales of 0.

    Raises:
      InputError: scales that are not finite or reach the largest value of their dtype; scales that are all too small
        for it.
    """
    for name, facts in jax.device_get(_facts(dict(weights), dict(floats or {}))).items():
        arrays = stored_arrays(weights[name])
        for (fits, _), stored in zip(facts, arrays, strict=True):
            if not fits:
                raise InputError(
                    f"{name}: its scales exceed what {stored.dtype} holds ({float(jnp.finfo(stored.dtype).max):.5g}): "
                    f"take a format that stores them wider, e.g. with scale='bfloat16' or scale='float32'."
                )
        if facts and not any(shows for _, shows in facts):
            raise InputError(
                f"{name}: its scales are too small for {arrays[0].dtype} (below {least(arrays[0].dtype):.2g}): take a "
                f"format that stores them wider, e.g. with scale='bfloat16' or scale='float32'."
            )


def stored_arrays(q: QTensor) -> list[Array]:
    """A weight's stored scales and float zeros that are floats of 16 bits or more."""
    arrays = []
    for values in (q.scale, q.zero):
        if isinstance(values, QTensor):
            arrays += stored_arrays(values)
        elif values is not None and jnp.issubdtype(values.dtype, jnp.floating) and values.dtype.itemsize > 1:
            arrays.append(values)
    return arrays


def least(dtype: jnp.dtype) -> float:
    """The smallest largest scale that is accepted; most hardware flushes subnormal float32 numbers to 0."""
    return max(STEPS * float(jnp.finfo(dtype).smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))


@jax.jit
def _facts(weights: dict[str, QTensor], floats: dict[str, Array]) -> dict[str, list[tuple[Array, Array]]]:
    """For each stored array: all values are below the dtype's largest; one is not too small, or the weight is all 0."""

    def facts(name: str, values: Array) -> tuple[Array, Array]:
        largest = jnp.max(jnp.abs(values))  # NaN if any value is
        shows = largest >= least(values.dtype)
        needs = jnp.any(floats[name] != 0) if name in floats else False
        return largest < jnp.finfo(values.dtype).max, shows | ~jnp.asarray(needs)

    return {name: [facts(name, values) for values in stored_arrays(q)] for name, q in weights.items()}
