"""How the statistics of a weight's inputs weight each token."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.traversals import flatten_mapping, unflatten_mapping
from jax import Array
from jaxtyping import Float, Int

from jquant.composition import Method
from jquant.learning.objectives import next_token_loss
from jquant.models.decoder import Decoder, Taps
from jquant.models.families import Site
from jquant.models.rotary import rotary_table


def weighting(site: Site, path: str, chosen: Method) -> str:
    """How a weight's statistics weight the tokens (`windows.Key.by`)."""
    match chosen.token_weights:
        case "attention":
            return dict(site.token_weights).get(path, "uniform")
        case "loss":
            return path
        case name:
            return name


def token_weight(taps: Taps, tap: str, by: str) -> Float[Array, "b t"] | None:
    """Each token's weight; None if all are equal. `by` is what `weighting` returns."""
    if by == "uniform":
        return None
    if by == "norm":
        return 1 / jnp.maximum(jnp.mean(taps[tap].astype(jnp.float32) ** 2, -1), 1e-12)
    return taps[by]


def token_gradients(decoder: Decoder, tokens: Int[np.ndarray, "b t"]) -> dict[str, Float[np.ndarray, "layers b t"]]:
    """Squared norm of the cross-entropy's gradient at each projection's output, token by token.

    To second order, an error Δ in a weight costs Σₜ (gₜᵀ Δᵀ xₜ)², g the gradient at its output; with g's direction
    averaged out that is Σₜ ‖gₜ‖² ‖Δᵀ xₜ‖²: a Gram matrix whose tokens count ‖gₜ‖² (GuidedQuant, arXiv 2505.07004).

    Cost: a forward pass, and a forward and a backward pass block by block: one block's activations are alive at a time.
    """
    norms = _token_gradients(*nnx.split(decoder), tokens)
    return {path: np.concatenate([np.asarray(part[path]) for part in norms]) for path in norms[0]}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Probed:
    """A kernel that adds a probe of zeros to its product; the probe's gradient is that at the projection's output."""

    kernel: Any
    probe: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.kernel + self.probe


@partial(jax.jit, static_argnums=0)
def _token_gradients(graph: Any, state: Any, tokens: Int[Array, "b t"]) -> list[dict[str, Array]]:
    decoder = nnx.merge(graph, state)
    rotary = rotary_table(decoder.config, jnp.arange(tokens.shape[1]))
    x, runs = decoder.embed(tokens), []
    for segment in decoder.segments:
        definition, stack = nnx.split(segment)

        def forward(x: Array, params: Any, definition: Any = definition) -> tuple[Array, Array]:
            return nnx.merge(definition, params)(x, rotary)[0], x

        x, inputs = jax.lax.scan(forward, x, stack)
        runs.append((definition, stack, inputs))

    def head(x: Array) -> Array:
        return next_token_loss(decoder.logits(decoder.norm(x)), tokens)

    slope, norms = jax.grad(head)(x), []
    for definition, stack, inputs in reversed(runs):

        def backward(slope: Array, layer: Any, definition: Any = definition) -> tuple[Array, dict[str, Array]]:
            params, x = layer
            params = flatten_mapping(nnx.to_pure_dict(params))
            kernels = {path: leaf for path, leaf in params.items() if path[-1] == "kernel"}

            def block(x: Array, probes: dict[Any, Array]) -> Array:
                probed = {path: _Probed(kernel, probes[path]) for path, kernel in kernels.items()}
                return nnx.merge(definition, nnx.State(unflatten_mapping(params | probed)))(x, rotary)[0]

            probes = {path: jnp.zeros((*x.shape[:2], kernel.shape[-1]), x.dtype) for path, kernel in kernels.items()}
            slope, at_outputs = jax.vjp(block, x, probes)[1](slope)
            return slope, {
                ".".join(map(str, path)): jnp.sum(g.astype(jnp.float32) ** 2, -1) for path, g in at_outputs.items()
            }

        slope, block_norms = jax.lax.scan(backward, slope, (stack, inputs), reverse=True)
        norms.insert(0, block_norms)
    return norms
