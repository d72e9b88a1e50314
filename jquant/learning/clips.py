"""What the calibration cross-entropy says about tokens and ranges, by gradients through the whole decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.nnx.traversals import flatten_mapping, unflatten_mapping
from jax import Array
from jaxtyping import Float, Int

from jquant.errors import InputError
from jquant.methods import Method
from jquant.models.decoder import Decoder, rotary_table
from jquant.ranges import LossSearch
from jquant.ranges.loss import clip_gradient, clipped, rounded

Choices = tuple[tuple[str, Method], ...]
Kernels = dict[tuple[Any, ...], Array]


def learn_clips(
    decoder: Decoder, layers: Sequence[Choices], tokens: Int[np.ndarray, "n context"]
) -> dict[int, dict[str, Float[Array, "groups columns"]]]:
    """Factors on the scales of every weight whose range is a `LossSearch`, learned together (see there for the cost).

    Args:
      decoder: float, all of it (which `check_plan` makes sure of).
      layers: the methods of each layer's weights, as `pipeline.check_plan` gives them.
      tokens: calibration windows.

    Returns:
      layer -> path within it -> factors. Weights of other ranges stay float while these are learned.

    Raises:
      InputError: the plan's searches do not agree on how to learn; a search's start quantizes the scales itself; a step
        whose gradient is not finite.
    """
    parts = _parts(layers)
    if not parts:
        return {}
    search = _shared_search(parts)
    graph, kernels, rest = nnx.split(decoder, _is_projection, ...)
    stacks = flatten_mapping(nnx.to_pure_dict(kernels))
    grids = [_grids(stacks[part.place][jnp.asarray(part.layers)], part.method) for part in parts]
    logs = [jnp.zeros(scale.shape, jnp.float32) for scale, _ in grids]
    state = optax.adam(search.rate).init(logs)
    for number in range(search.steps):
        batch = np.take(tokens, range(number * search.windows, (number + 1) * search.windows), 0, mode="wrap")
        logs, state = _step(graph, parts, search.rate, stacks, rest, grids, logs, state, batch)
        if not all_finite(logs):
            raise InputError(
                f"LossSearch, step {number + 1} of {search.steps}: the gradient of the calibration loss is not finite; "
                f"probably activations overflow their dtype."
            )
    learned: dict[int, dict[str, Array]] = {layer: {} for layer in range(len(layers))}
    for part, log in zip(parts, logs, strict=True):
        for index, layer in enumerate(part.layers):
            learned[layer][part.path] = jnp.exp(log[index])
    return learned


@jax.jit
def all_finite(tree: Any) -> Array:
    """Whether every number of a tree's arrays is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def token_gradients(decoder: Decoder, tokens: Int[np.ndarray, "b t"]) -> dict[str, Float[np.ndarray, "layers b t"]]:
    """Squared norm of the cross-entropy's gradient at each projection's output, token by token.

    To second order, an error Δ in a weight costs Σₜ (gₜᵀ Δᵀ xₜ)², g the gradient at its output; with g's direction
    averaged out that is Σₜ ‖gₜ‖² ‖Δᵀ xₜ‖²: a Gram matrix whose tokens count ‖gₜ‖² (GuidedQuant, arXiv 2505.07004).

    Cost: a forward pass, and a forward and a backward pass block by block, so that only one block's activations live.
    """
    norms = _token_gradients(*nnx.split(decoder), tokens)
    return {path: np.concatenate([np.asarray(part[path]) for part in norms]) for path in norms[0]}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Probed:
    """A kernel whose product has a probe added, at 0: the gradient there is the one at the projection's output."""

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
        return _next_token_loss(decoder.logits(decoder.norm(x)), tokens)

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

        slope, found = jax.lax.scan(backward, slope, (stack, inputs), reverse=True)
        norms.insert(0, found)
    return norms


@dataclass(frozen=True)
class _Part:
    """The layers of one stacked kernel that one method rounds."""

    path: str
    method: Method
    layers: tuple[int, ...]

    @property
    def place(self) -> tuple[Any, ...]:
        """The stack's among the decoder's parameters."""
        return ("segments", 0, *self.path.split("."))


def _parts(layers: Sequence[Choices]) -> tuple[_Part, ...]:
    found: dict[tuple[str, Method], tuple[int, ...]] = {}
    for layer, choices in enumerate(layers):
        for path, method in choices:
            if isinstance(method.range, LossSearch):
                found[path, method] = (*found.get((path, method), ()), layer)
    return tuple(_Part(*key, which) for key, which in found.items())


def _shared_search(parts: Sequence[_Part]) -> LossSearch:
    """The range that says how to learn; what the parts start from may differ."""
    ranges = [part.method.range for part in parts if isinstance(part.method.range, LossSearch)]
    if len({(one.steps, one.windows, one.rate) for one in ranges}) > 1:
        raise InputError("A plan's LossSearch ranges are learned together: give them the same steps, windows and rate.")
    return ranges[0]


@partial(jax.jit, static_argnames="method")
def _grids(stack: Float[Array, "*l in out"], method: Method) -> tuple[Array, Array | None]:
    assert isinstance(method.range, LossSearch)
    initial = method.range.initial
    return jax.lax.map(lambda w: initial(w.astype(jnp.float32), method.format), stack)


@partial(jax.jit, static_argnames=("graph", "parts", "rate"), donate_argnames=("logs", "state"))
def _step(
    graph: Any,
    parts: tuple[_Part, ...],
    rate: float,
    stacks: Kernels,
    rest: Any,
    grids: list[Any],
    logs: list[Array],
    state: Any,
    tokens: Int[Array, "b t"],
) -> tuple[list[Array], Any]:
    """One of Adam's steps on the logarithms of the factors."""
    now = [clipped(grid, jnp.exp(log)) for grid, log in zip(grids, logs, strict=True)]
    values, slopes = dict(stacks), []
    for part, grid in zip(parts, now, strict=True):
        at, format = jnp.asarray(part.layers), part.method.format
        new = _map(partial(rounded, format=format), stacks[part.place][at], grid)
        values[part.place] = values[part.place].at[at].set(new.astype(values[part.place].dtype))
    gradients = jax.grad(lambda kernels: _cross_entropy(graph, kernels, rest, tokens))(values)
    for part, grid in zip(parts, now, strict=True):
        at, slope = jnp.asarray(part.layers), partial(clip_gradient, format=part.method.format)
        slopes.append(_map(slope, stacks[part.place][at], grid, gradients[part.place][at]))
    updates, state = optax.adam(rate).update(slopes, state)
    return optax.apply_updates(logs, updates), state  # pyright: ignore[reportReturnType]


def _map(function: Callable[..., Array], *stacks: Any) -> Array:
    """Layer by layer, so that one layer's temporaries are alive at a time."""
    return jax.lax.map(lambda layer: function(*layer), stacks)


def _cross_entropy(graph: Any, kernels: Kernels, rest: Any, tokens: Int[Array, "b t"]) -> Array:
    decoder = nnx.merge(graph, nnx.State(unflatten_mapping(kernels)), rest)
    return _next_token_loss(decoder(tokens), tokens)


def _next_token_loss(logits: Float[Array, "b t vocab"], tokens: Int[Array, "b t"]) -> Float[Array, ""]:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32)), tokens[:, 1:, None], -1)
    return -jnp.mean(chosen)


def _is_projection(path: tuple[Any, ...], _: Any) -> bool:
    return path[0] == "segments" and path[-1] == "kernel"
