"""Whether a weight's scales fit the dtype that they are stored in."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from jquant.errors import InputError
from jquant.qtensor import QTensor

# A largest scale of fewer steps between the dtype's subnormal numbers than this is off by more than 3 %, the others by
# more still. Normal weights stay far from it: of Q6_K, whose scales are the smallest, those up from 0.004.
STEPS = 16


def check_scales(weights: Mapping[str, QTensor], floats: Mapping[str, Array] | None = None) -> None:
    """Refuses weights whose scales, or float zeros, did not survive being stored.

    Scales of 8-bit floats, and quantized ones, saturate by design: of those the outermost dtype counts.

    Args:
      weights: by name.
      floats: what they were rounded from, by the same names, if that is known: scales that are all but 0 belong to a
        matrix of zeros.

    Raises:
      InputError: scales that are not finite, or as large as their dtype goes; scales all so small that little is left
        of them.
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
    """A weight's scales and float zeros as they lie in memory, where those are floats of 16 bits or more."""
    found = []
    for values in (q.scale, q.zero):
        if isinstance(values, QTensor):
            found += stored_arrays(values)
        elif values is not None and jnp.issubdtype(values.dtype, jnp.floating) and values.dtype.itemsize > 1:
            found.append(values)
    return found


def least(dtype: jnp.dtype) -> float:
    """From where on a largest scale is kept well enough; subnormal float32 numbers are 0 to most hardware."""
    return max(STEPS * float(jnp.finfo(dtype).smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))


@jax.jit
def _facts(weights: dict[str, QTensor], floats: dict[str, Array]) -> dict[str, list[tuple[Array, Array]]]:
    """Of each stored array: whether all values are below the dtype's end, and whether one is not lost (or need be)."""

    def facts(name: str, values: Array) -> tuple[Array, Array]:
        largest = jnp.max(jnp.abs(values))  # NaN if one is
        shows = largest >= least(values.dtype)
        needs = jnp.any(floats[name] != 0) if name in floats else False
        return largest < jnp.finfo(values.dtype).max, shows | ~jnp.asarray(needs)

    return {name: [facts(name, values) for values in stored_arrays(q)] for name, q in weights.items()}
