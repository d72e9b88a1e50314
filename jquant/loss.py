"""What the calibration cross-entropy says about a plan's ranges, by gradients through the whole decoder."""

from collections.abc import Sequence
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

from jquant.methods import Method
from jquant.models.decoder import Decoder
from jquant.ranges import LossSearch
from jquant.ranges.loss import clip_gradient, clipped, rounded

Choices = tuple[tuple[str, Method], ...]
Kernels = dict[tuple[Any, ...], Array]


def learn_clips(
    decoder: Decoder, layers: Sequence[Choices], tokens: Int[np.ndarray, "n context"]
) -> dict[int, dict[str, Float[Array, "groups columns"]]]:
    """Factors on the scales of every weight whose range is a `LossSearch`, learned together (see there for the cost).

    Args:
      decoder: float.
      layers: the methods of each layer's weights, as `pipeline.check_plan` gives them.
      tokens: calibration windows.

    Returns:
      layer -> path within it -> factors. Weights of other ranges stay float while these are learned.
    """
    chosen = _stacks(decoder, layers)
    if not chosen:
        return {}
    search = next(iter(chosen))[1].range
    assert isinstance(search, LossSearch)
    graph, kernels, rest = nnx.split(decoder, _is_projection, ...)
    stacks = flatten_mapping(nnx.to_pure_dict(kernels))
    grids = {key: _grids(stacks[key[0]][jnp.asarray(at)], key[1]) for key, at in chosen.items()}
    logs = {key: jnp.zeros(grid[0].shape, jnp.float32) for key, grid in grids.items()}
    state = optax.adam(search.rate).init(logs)
    at = {key: jnp.asarray(index) for key, index in chosen.items()}
    for number in range(search.steps):
        batch = np.take(tokens, range(number * search.windows, (number + 1) * search.windows), 0, mode="wrap")
        logs, state = _step(graph, stacks, rest, at, grids, logs, state, batch, search.rate)
    return {
        layer: {path: jnp.exp(logs[key][index.index(layer)]) for key, index in chosen.items() if layer in index
                for path in [_path(key[0])]}
        for layer in range(len(layers))
    }  # fmt: skip


def _stacks(decoder: Decoder, layers: Sequence[Choices]) -> dict[tuple[tuple[Any, ...], Method], tuple[int, ...]]:
    """(Stacked kernel, method) -> the layers that round it so, by their place in the stack."""
    chosen: dict[tuple[tuple[Any, ...], Method], tuple[int, ...]] = {}
    for layer, choices in enumerate(layers):
        for path, method in choices:
            if isinstance(method.range, LossSearch):
                key = (("segments", 0, *path.split(".")), method)
                chosen[key] = (*chosen.get(key, ()), layer)
    return chosen


@partial(jax.jit, static_argnames="method")
def _grids(stack: Float[Array, "*l in out"], method: Method) -> tuple[Array, Array | None]:
    assert isinstance(method.range, LossSearch)
    start = method.range.start
    return jax.lax.map(lambda w: start(w.astype(jnp.float32), method.format), stack)


@partial(jax.jit, static_argnames=("graph", "rate"), donate_argnames=("logs", "state"))
def _step(
    graph: Any, stacks: Kernels, rest: Any, at: Any, grids: Any, logs: Any, state: Any, tokens: Array, rate: float
) -> tuple[Any, Any]:
    """One of Adam's steps on the logarithms of the factors."""
    now = {key: clipped(grids[key], jnp.exp(log)) for key, log in logs.items()}
    values = dict(stacks)
    for (place, method), index in at.items():
        each = lambda pair, method=method: rounded(*pair, method.format)  # noqa: E731
        new = jax.lax.map(each, (stacks[place][index], now[place, method]))
        values[place] = values[place].at[index].set(new.astype(values[place].dtype))
    gradients = jax.grad(lambda kernels: _cross_entropy(graph, kernels, rest, tokens))(values)
    slopes = {}
    for (place, method), index in at.items():
        each = lambda trio, method=method: clip_gradient(trio[0], trio[1], method.format, trio[2])  # noqa: E731
        slopes[place, method] = jax.lax.map(each, (stacks[place][index], now[place, method], gradients[place][index]))
    updates, state = optax.adam(rate).update(slopes, state)
    return optax.apply_updates(logs, updates), state


def _cross_entropy(graph: Any, kernels: Kernels, rest: Any, tokens: Int[Array, "b t"]) -> Array:
    decoder = nnx.merge(graph, nnx.State(unflatten_mapping(kernels)), rest)
    logits = decoder(tokens[:, :-1]).astype(jnp.float32)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1))


def _is_projection(path: tuple[Any, ...], _: Any) -> bool:
    return path[0] == "segments" and path[-1] == "kernel"


def _path(place: tuple[Any, ...]) -> str:
    return ".".join(place[2:])
