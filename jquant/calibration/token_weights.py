"""How the statistics of a weight's inputs weight each token."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.calibration.loss_gradients import names_of
from jquant.composition import Method
from jquant.models.decoder import Taps
from jquant.models.families import Site


def weightings(site: Site, path: str, chosen: Method) -> tuple[str, ...]:
    """How a weight's statistics weight the tokens (`windows.Key.by`), for each group of its outputs."""
    if chosen.loss_gradient:
        return names_of(chosen.loss_gradient, path)
    if chosen.token_weights == "attention":
        return (dict(site.token_weights).get(path, "uniform"),)
    return (str(chosen.token_weights),)


def token_weight(taps: Taps, tap: str, by: str) -> Float[Array, "b t"] | None:
    """Each token's weight; None if all are equal. `by` is one of `weightings`."""
    if by == "uniform":
        return None
    if by == "norm":
        return 1 / jnp.maximum(jnp.mean(taps[tap].astype(jnp.float32) ** 2, -1), 1e-12)
    return taps[by]
