"""Ranges learned on the calibration cross-entropy, by gradients through the whole decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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

from jquant.composition import Choices, Method
from jquant.errors import InputError
from jquant.learning.objectives import all_finite, next_token_loss
from jquant.models.decoder import Decoder
from jquant.ranges import LossSearch
from jquant.ranges.loss import clip_gradient, clipped, rounded

Kernels = dict[tuple[Any, ...], Array]


def learn_clips(
    decoder: Decoder, layers: Sequence[Choices], tokens: Int[np.ndarray, "n context"]
) -> dict[int, dict[str, Float[Array, "groups columns"]]]:
    """Factors on the scales of every weight whose range is a `LossSearch`, learned together.

    Args:
      decoder: float, all of it.
      layers: the methods of each layer's weights, as in `pipeline.plan.Plan`.
      tokens: calibration windows.

    Returns:
      layer -> path within it -> factors. Weights with other ranges are float while these are learned. `LossSearch` says
      what it costs.

    Raises:
      InputError: `LossSearch` ranges with different steps, windows or rates; one that starts from quantized scales; a
        step whose gradient is not finite.
    """
    parts = _parts(layers)
    if not parts:
        return {}
    search = _shared_search(parts)
    student = _student(decoder, parts)
    logs = [jnp.zeros(scale.shape, jnp.float32) for scale, _ in student.grids]
    moments = optax.adam(search.rate).init(logs)
    for number in range(search.steps):
        batch = np.take(tokens, range(number * search.windows, (number + 1) * search.windows), 0, mode="wrap")
        logs, moments = _step(logs, moments, student, batch, search.rate)
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


@dataclass(frozen=True)
class _Part:
    """The layers of one stacked kernel that one method rounds."""

    path: str
    method: Method
    layers: tuple[int, ...]

    @property
    def place(self) -> tuple[Any, ...]:
        """The stack's path among the decoder's parameters."""
        return ("segments", 0, *self.path.split("."))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Student:
    """What no step changes: the float decoder in parts, and the grids at factors of 1.

    Attributes:
      graph: the decoder's structure.
      parts: what is learned.
      stacks: the decoder's kernels, by their path.
      rest: its other parameters.
      grids: (scale, zero) of each part, stacked over its layers.
    """

    graph: Any = field(metadata={"static": True})
    parts: tuple[_Part, ...] = field(metadata={"static": True})
    stacks: Kernels
    rest: Any
    grids: list[Any]

    def loss(self, kernels: Kernels, tokens: Int[Array, "b t"]) -> Array:
        """Cross-entropy of the decoder with these kernels."""
        decoder = nnx.merge(self.graph, nnx.State(unflatten_mapping(kernels)), self.rest)
        return next_token_loss(decoder(tokens), tokens)


def _student(decoder: Decoder, parts: tuple[_Part, ...]) -> _Student:
    graph, kernels, rest = nnx.split(decoder, _is_projection, ...)
    stacks = flatten_mapping(nnx.to_pure_dict(kernels))
    grids = [_grids(stacks[part.place][jnp.asarray(part.layers)], part.method) for part in parts]
    return _Student(graph, parts, stacks, rest, grids)


def _parts(layers: Sequence[Choices]) -> tuple[_Part, ...]:
    layers_of: dict[tuple[str, Method], tuple[int, ...]] = {}
    for layer, choices in enumerate(layers):
        for path, method in choices:
            if isinstance(method.range, LossSearch):
                layers_of[path, method] = (*layers_of.get((path, method), ()), layer)
    return tuple(_Part(*key, numbers) for key, numbers in layers_of.items())


def _shared_search(parts: Sequence[_Part]) -> LossSearch:
    """A range with the steps, windows and rate of all parts; their initial ranges may differ."""
    ranges = [part.method.range for part in parts if isinstance(part.method.range, LossSearch)]
    if len({(search.steps, search.windows, search.rate) for search in ranges}) > 1:
        raise InputError("A plan's LossSearch ranges are learned together: give them the same steps, windows and rate.")
    return ranges[0]


@partial(jax.jit, static_argnames="method")
def _grids(stack: Float[Array, "*l in out"], method: Method) -> tuple[Array, Array | None]:
    assert isinstance(method.range, LossSearch)
    initial = method.range.initial
    return jax.lax.map(lambda w: initial(w.astype(jnp.float32), method.format), stack)


@partial(jax.jit, static_argnames="rate", donate_argnames=("logs", "moments"))
def _step(
    logs: list[Array], moments: Any, student: _Student, tokens: Int[Array, "b t"], rate: float
) -> tuple[list[Array], Any]:
    """One step of Adam on the logarithms of the factors."""
    stacks = student.stacks
    grids = [clipped(grid, jnp.exp(log)) for grid, log in zip(student.grids, logs, strict=True)]
    values, slopes = dict(stacks), []
    for part, grid in zip(student.parts, grids, strict=True):
        at, format = jnp.asarray(part.layers), part.method.format
        quantized = _map(partial(rounded, format=format), stacks[part.place][at], grid)
        values[part.place] = values[part.place].at[at].set(quantized.astype(values[part.place].dtype))
    gradients = jax.grad(student.loss)(values, tokens)
    for part, grid in zip(student.parts, grids, strict=True):
        at, slope = jnp.asarray(part.layers), partial(clip_gradient, format=part.method.format)
        slopes.append(_map(slope, stacks[part.place][at], grid, gradients[part.place][at]))
    updates, moments = optax.adam(rate).update(slopes, moments)
    return optax.apply_updates(logs, updates), moments  # pyright: ignore[reportReturnType]


def _map(function: Callable[..., Array], *stacks: Any) -> Array:
    """Layer by layer, so that one layer's temporaries are alive at a time."""
    return jax.lax.map(lambda layer: function(*layer), stacks)


def _is_projection(path: tuple[Any, ...], _: Any) -> bool:
    return path[0] == "segments" and path[-1] == "kernel"
