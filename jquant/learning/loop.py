"""The training loop: one jitted, donated step, an order of windows, and what it leaves on disk."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int

from jquant.composition import Tuning
from jquant.errors import InputError
from jquant.learning.journal import Writer
from jquant.learning.objectives import all_finite
from jquant.parallel.mesh import DATA, Devices
from jquant.parallel.processes import gather
from jquant.progress import Progress

Learned = dict[tuple[Any, ...], dict[str, Array]]  # by the parameter's path
Rates = dict[str, Any]  # scalars by the parameter's name
Loss = Callable[[Learned, Any, Any, Tuning], Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a step changes: what is learned, and the optimizer's moments."""

    learned: Any
    moments: Any


@dataclass(frozen=True)
class Task:
    """What is trained on.

    Attributes:
      name: in error messages, e.g. "Tuning of the model".
      start: makes what is learned, before the first step.
      loss: a function of what is learned, `frozen`, a batch and the stage; a mean over the batch's windows.
      frozen: what no step changes.
      batch: the batch of a step, counted from 0, with these windows: a tree of arrays `[windows, …]`.
      count: windows in all.
      context: tokens a window.
      packed: the module with what is learned, for evaluations.
      devices: the mesh over which parameters, moments and windows are split; None for one device.
    """

    name: str
    start: Callable[[], Learned]
    loss: Loss
    frozen: Any
    batch: Callable[[int, Int[np.ndarray, " windows"]], Any]
    count: int
    context: int
    packed: Callable[[Learned], Any]
    devices: Devices | None = None


def fit(task: Task, stage: Tuning, writer: Writer | None = None, progress: Progress | None = None) -> Learned:
    """What is learned after the stage's steps.

    Args:
      task: what is trained on.
      stage: see `Tuning`.
      writer: of checkpoints, from which a killed training goes on, and metrics.
      progress: called with ("tune", steps done, steps in all), the loss before that step and the speed.

    Raises:
      InputError: a step whose loss or parameters are not finite; what can't be written.
    """

    devices = task.devices
    cut = devices.parameters if devices else lambda tree: tree
    on_data = (lambda batch: devices.place(batch, DATA)) if devices else lambda tree: tree
    # The packed module is made where the task's own arrays lie: on one device.
    at_hand = (lambda tree: jax.tree.map(jnp.asarray, gather(tree))) if devices else lambda tree: tree

    def start() -> State:
        learned = task.start()
        return cut(State(learned, optimizer(stage).init(learned)))

    first, state = (0, start()) if writer is None else writer.resumed(start)
    # A state that was read has counts that lie nowhere yet.
    state, frozen, program = cut(state), cut(task.frozen), Program.of(task.loss, stage, devices)
    begin = time.perf_counter()
    for number in range(first, stage.steps):
        done, last = number + 1, number + 1 == stage.steps
        batch = on_data(task.batch(number, windows_of(number, task.count, stage)))
        state, value, finite = step(state, frozen, batch, rates_of(stage, number), program)
        if not finite:  # waits: one step's activations are alive at a time
            kept = f" The checkpoint before is in {writer.folder}." if writer and writer.kept() else ""
            raise InputError(
                f"{task.name}, step {done} of {stage.steps}: the loss ({value:.4g}) or what is learned is not "
                f"finite; take a lower rate, or look for activations that overflow their dtype.{kept}"
            )
        loss, tokens = float(value), stage.windows * task.context
        speed = (done - first) * tokens / (time.perf_counter() - begin)
        if writer:
            writer.note(done, {"loss": loss, "tokens": done * tokens})
            if writer.due(done, last):
                writer.note(done, writer.evaluated(task.packed(at_hand(state.learned))))
            writer.wrote(done, state, last)
        if progress:
            progress("tune", done, stage.steps, loss=loss, **{"tokens/s": speed})
    return at_hand(state.learned)


def windows_of(step: int, count: int, stage: Tuning) -> Int[np.ndarray, " windows"]:
    """The windows of a step, counted from 0: each of `count` comes once an epoch, in an order drawn from the seed."""
    positions = np.arange(step * stage.windows, (step + 1) * stage.windows)
    epochs = {
        epoch: np.random.default_rng([stage.seed, int(epoch)]).permutation(count) for epoch in {*(positions // count)}
    }
    return np.asarray([epochs[position // count][position % count] for position in positions])


@dataclass(frozen=True)
class Program:
    """What a step is compiled from; rates are its arguments.

    Attributes:
      loss: a function of what is learned, what no step changes, a part of a batch and the stage; a mean over windows.
      stage: of those that differ in rates, schedule, warmup, steps and seed alone, the one with fixed values of these.
      devices: the mesh over which the state is split.
    """

    loss: Loss
    stage: Tuning
    devices: Devices | None = None

    @staticmethod
    def of(loss: Loss, stage: Tuning, devices: Devices | None = None) -> "Program":
        """The program of a stage: one compilation serves all rates, schedules and orders."""
        fixed = {name: getattr(Tuning(), name) for name in ("rate", "schedule", "warmup", "seed")}
        learned = {name: float(getattr(stage, name) > 0) for name in ("weight_rate", "norm_rate", "level_rate")}
        return Program(loss, replace(stage, steps=1, **fixed, **learned), devices)


@partial(jax.jit, static_argnames="program", donate_argnames="state")
def step(
    state: State, frozen: Any, batch: Any, rates: Rates, program: Program
) -> tuple[State, Float[Array, ""], Array]:
    """One step of the optimizer.

    Args:
      state: donated.
      frozen: what no step changes.
      batch: arrays `[windows, …]`; `stage.accumulate` equal parts go through the model one after another.
      rates: of this step, by the parameter's name.
      program: loss, stage and mesh.

    Returns:
      The new state, the loss before the step, and whether loss and new parameters are finite.
    """
    stage, devices = program.stage, program.devices
    gradient = jax.value_and_grad(program.loss)
    if stage.accumulate == 1:
        value, slopes = gradient(state.learned, frozen, batch, stage)
    else:
        parts = jax.tree.map(lambda a: a.reshape(stage.accumulate, -1, *a.shape[1:]), batch)
        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.learned))
        add = lambda so_far, part: (jax.tree.map(jnp.add, so_far, gradient(state.learned, frozen, part, stage)), None)  # noqa: E731
        total, _ = jax.lax.scan(add, zero, parts)
        value, slopes = jax.tree.map(lambda a: a / stage.accumulate, total)
    updates: Any
    updates, moments = optimizer(stage).update(slopes, state.moments, state.learned)
    moved = {path: {name: -rates[name] * u for name, u in each.items()} for path, each in updates.items()}
    learned = optax.apply_updates(state.learned, moved)
    if devices:
        learned, moments = devices.constrain((learned, moments))
    return State(learned, moments), value, jnp.isfinite(value) & all_finite(learned)


def optimizer(stage: Tuning) -> optax.GradientTransformation:
    """The stage's optimizer without its rates: clipped gradients, scaled by their moments."""
    parts = [optax.clip_by_global_norm(stage.clip)] if stage.clip else []
    match stage.optimizer:
        case "adam":
            parts.append(optax.scale_by_adam(b2=stage.b2))
        case "lion":
            parts.append(optax.scale_by_lion(b2=stage.b2))
        case "adafactor":
            parts.append(optax.scale_by_factored_rms())
    return optax.chain(*parts)


def rates_of(stage: Tuning, step: int) -> Rates:
    """The rate of each parameter, by its name, at a step counted from 0."""
    rates = dict.fromkeys(("log_scale", "log_clip", "shift", "a", "b"), stage.rate)
    rates |= {"weight": stage.weight_rate, "norm": stage.norm_rate, "level": stage.level_rate}
    factor = np.asarray(schedule(stage)(step))
    # NumPy's scalars, which go to the devices of all processes.
    return {name: np.float32(rate * factor) for name, rate in rates.items()}


def schedule(stage: Tuning) -> optax.Schedule:
    """The factor on every rate by step: linear warm-up to 1, then down to 0 along a cosine or a line, or neither."""
    falling = max(stage.steps - stage.warmup, 1)
    down = {
        "cosine": optax.cosine_decay_schedule(1.0, falling),
        "linear": optax.linear_schedule(1.0, 0.0, falling),
        "constant": optax.constant_schedule(1.0),
    }[stage.schedule]
    if not stage.warmup:
        return down
    # The first step has a rate, too.
    return optax.join_schedules([optax.linear_schedule(1 / stage.warmup, 1.0, stage.warmup - 1), down], [stage.warmup])
