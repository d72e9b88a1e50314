"""The gradient of the loss at the outputs of every projection, token by token."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from jquant.composition import LossGradient, Method
from jquant.learning.objectives import next_token_loss
from jquant.models.decoder import Block, Decoder
from jquant.models.params import flat_params, with_params
from jquant.models.rotary import rotary_table

Weights = dict[str, Float[np.ndarray, "layers b t"]]


def names_of(way: LossGradient, path: str) -> tuple[str, ...]:
    """The names of a weight's token weights, one for each group of its outputs."""
    name = path if way.labels == "text" else f"{path} {way.labels}"
    return tuple(f"{name} {group + 1}/{way.groups}" if way.groups > 1 else name for group in range(way.groups))


def loss_gradients(
    decoder: Decoder, tokens: Int[Array | np.ndarray, "b t"], methods: Iterable[Method]
) -> tuple[Weights, list[Float[Array, "b t d"]]]:
    """What methods ask of the loss's gradient at a batch of windows.

    The loss is the mean cross-entropy of a window, so it does not depend on how windows are put together to batches.

    Cost: a forward pass, and a forward and a backward pass block by block, for each kind of labels: one block's
    activations are alive at a time, and one value of the residual stream a layer.

    Returns:
      Token weights by name (`names_of`): the squared norm of the gradient at the outputs of a group; and, where a
      method needs "output_gram", the gradient behind each block under drawn labels, bfloat16.
    """
    methods = set(methods)
    ways = {method.loss_gradient for method in methods if method.loss_gradient}
    keep = any("output_gram" in method.needs for method in methods)
    weights: Weights = {}
    slopes: list[Array] = []
    for labels in ("text", "drawn"):
        chosen = [way for way in ways if way.labels == labels]
        behind_too = keep and labels == "drawn"
        if not chosen and not behind_too:
            continue
        norms, behind = _backward(*nnx.split(decoder), tokens, labels, tuple(sorted(way.groups for way in chosen)))
        for way in chosen:
            for path in norms[0]:
                whole = np.concatenate([np.asarray(part[path][way.groups]) for part in norms])
                weights |= {name: whole[..., group] for group, name in enumerate(names_of(way, path))}
        if behind_too:
            slopes = [slope for part in behind for slope in part]
    return weights, slopes


def token_gradients(decoder: Decoder, tokens: Int[Array | np.ndarray, "b t"]) -> Weights:
    """Squared norm of the gradient of the windows' mean cross-entropy at each projection's output, token by token."""
    norms, _ = _backward(*nnx.split(decoder), tokens, "text", (1,))
    whole = {path: np.concatenate([np.asarray(part[path][1]) for part in norms]) for path in norms[0]}
    return {path: norm[..., 0] / len(tokens) ** 2 for path, norm in whole.items()}


def drawn_tokens(logits: Float[Array, "b t vocab"], tokens: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Windows whose tokens after the first are drawn from the logits before them.

    The seed of each window is a polynomial hash of its tokens, so it does not depend on the other windows of a batch.
    """
    factors = jnp.cumprod(jnp.full(tokens.shape[1], 2654435761, jnp.uint32))
    seeds = jnp.sum(tokens.astype(jnp.uint32) * factors, 1, dtype=jnp.uint32)
    draw = jax.vmap(lambda seed, of_one: jax.random.categorical(jax.random.key(seed), of_one))
    drawn = draw(seeds, jax.lax.stop_gradient(logits).astype(jnp.float32))
    return jnp.concatenate([tokens[:, :1], drawn[:, :-1].astype(tokens.dtype)], 1)


def at_outputs(
    block: Block, x: Float[Array, "b t d"], slope: Float[Array, "b t d"], rotary: Array
) -> tuple[Float[Array, "b t d"], dict[str, Float[Array, "b t out"]]]:
    """The loss's gradient before a block, and at the outputs of its projections, from that behind the block."""
    kernels = {path: leaf for path, leaf in flat_params(block).items() if path.endswith(".kernel")}

    def through(x: Array, probes: dict[str, Array]) -> Array:
        probed = {path: _Probed(kernel, probes[path]) for path, kernel in kernels.items()}
        return with_params(block, probed)(x, rotary)[0]

    probes = {path: jnp.zeros((*x.shape[:2], kernel.shape[-1]), x.dtype) for path, kernel in kernels.items()}
    return jax.vjp(through, x, probes)[1](slope.astype(x.dtype))


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


@partial(jax.jit, static_argnums=(0, 3, 4))
def _backward(
    graph: Any,
    state: Any,
    tokens: Int[Array, "b t"],
    labels: str,
    groups: tuple[int, ...],
) -> tuple[list[dict[str, dict[int, Array]]], list[Float[Array, "layers b t d"]]]:
    """For each segment: squared norms `[layers, b, t, groups]` by path and number of groups; gradients behind."""
    decoder = nnx.merge(graph, state)
    rotary = rotary_table(decoder.config, jnp.arange(tokens.shape[1]))
    x, runs = decoder.embed(tokens), []
    for segment in decoder.segments:
        definition, stack = nnx.split(segment)

        def forward(x: Array, params: Any, definition: Any = definition) -> tuple[Array, Array]:
            return nnx.merge(definition, params)(x, rotary)[0], x

        x, inputs = jax.lax.scan(forward, x, stack)
        runs.append((definition, stack, inputs))

    def loss(x: Array) -> Array:
        logits = decoder.logits(decoder.norm(x))
        following = drawn_tokens(logits, tokens) if labels == "drawn" else tokens
        return len(tokens) * next_token_loss(logits, following)

    slope, norms, behind = jax.grad(loss)(x), [], []
    for definition, stack, inputs in reversed(runs):

        def backward(slope: Array, layer: Any, definition: Any = definition) -> tuple[Array, Any]:
            params, x = layer
            before, gradients = at_outputs(nnx.merge(definition, params), x, slope, rotary)

            def of_groups(g: Array, count: int) -> Array:
                return jnp.sum(g.astype(jnp.float32).reshape(*g.shape[:2], count, -1) ** 2, -1)

            found = {path: {count: of_groups(g, count) for count in groups} for path, g in gradients.items()}
            return before, (found, slope.astype(jnp.bfloat16))

        slope, (of_blocks, slopes) = jax.lax.scan(backward, slope, (stack, inputs), reverse=True)
        norms.insert(0, of_blocks)
        behind.insert(0, slopes)
    return norms, behind
