"""The training loop: one jitted, donated step, an order of windows, and what it leaves on disk."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int

from jquant.composition import Tuning
from jquant.learning.objectives import all_finite

Learned = dict[tuple[Any, ...], dict[str, Array]]  # by the parameter's path
Loss = Callable[[Learned, Any, Any, Tuning], Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a step changes: what is learned, and the optimizer's moments."""

    learned: Any
    moments: Any


def start(learned: Learned, stage: Tuning) -> State:
    """The state before the first step."""
    return State(learned, optimizer(stage).init(learned))


def windows_of(step: int, count: int, stage: Tuning) -> Int[np.ndarray, " windows"]:
    """The windows of a step, counted from 0: each of `count` comes once an epoch, in an order drawn from the seed."""
    positions = np.arange(step * stage.windows, (step + 1) * stage.windows)
    epochs = {epoch: np.random.default_rng([stage.seed, epoch]).permutation(count) for epoch in {*(positions // count)}}
    return np.asarray([epochs[position // count][position % count] for position in positions])


@partial(jax.jit, static_argnames=("loss", "stage"), donate_argnames="state")
def step(
    state: State, frozen: Any, batch: Any, *, loss: Loss, stage: Tuning
) -> tuple[State, Float[Array, ""], Array]:
    """One step of the optimizer.

    Args:
      state: donated.
      frozen: what no step changes.
      batch: arrays `[windows, …]`; `stage.accumulate` equal parts go through the model one after another.
      loss: a function of what is learned, `frozen`, a part of the batch and the stage; a mean over its windows.
      stage: see `Tuning`.

    Returns:
      The new state, the loss before the step, and whether loss and new parameters are finite.
    """
    gradient = jax.value_and_grad(loss)
    if stage.accumulate == 1:
        value, slopes = gradient(state.learned, frozen, batch, stage)
    else:
        parts = jax.tree.map(lambda a: a.reshape(stage.accumulate, -1, *a.shape[1:]), batch)
        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.learned))
        add = lambda so_far, part: (jax.tree.map(jnp.add, so_far, gradient(state.learned, frozen, part, stage)), None)  # noqa: E731
        total, _ = jax.lax.scan(add, zero, parts)
        value, slopes = jax.tree.map(lambda a: a / stage.accumulate, total)
    updates, moments = optimizer(stage).update(slopes, state.moments, state.learned)
    learned = optax.apply_updates(state.learned, updates)
    return State(learned, moments), value, jnp.isfinite(value) & all_finite(learned)


def optimizer(stage: Tuning) -> optax.GradientTransformation:
    """The stage's optimizer: clipped gradients, scaled by their moments, times each parameter's rate."""
    rates = {"log_scale": stage.rate, "shift": stage.rate, "weight": stage.weight_rate, "norm": stage.norm_rate}
    rates |= {"a": stage.rate, "b": stage.rate}  # of adapters
    parts = [optax.clip_by_global_norm(stage.clip)] if stage.clip else []
    match stage.optimizer:
        case "adam":
            parts.append(optax.scale_by_adam(b2=stage.b2))
        case "lion":
            parts.append(optax.scale_by_lion(b2=stage.b2))
        case "adafactor":
            parts.append(optax.scale_by_factored_rms())
    return optax.chain(*parts, _scaled(rates), optax.scale_by_learning_rate(schedule(stage)))


def schedule(stage: Tuning) -> optax.Schedule:
    """The factor on every rate by step: linear warm-up to 1, then down to 0 along a cosine or a line."""
    falling = max(stage.steps - stage.warmup, 1)
    down = optax.cosine_decay_schedule(1.0, falling) if stage.schedule == "cosine" else optax.linear_schedule(1.0, 0.0, falling)
    if not stage.warmup:
        return down
    # The first step has a rate, too.
    return optax.join_schedules([optax.linear_schedule(1 / stage.warmup, 1.0, stage.warmup - 1), down], [stage.warmup])


def _scaled(rates: dict[str, float]) -> optax.GradientTransformation:
    """Multiplies every update by its parameter's rate."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        return {path: {name: rates[name] * u for name, u in each.items()} for path, each in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def epochs(stage: Tuning, count: int) -> Iterator[np.ndarray]:
    """The windows of every step."""
    return (windows_of(step, count, stage) for step in range(stage.steps))
