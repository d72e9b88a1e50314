"""After rounding: scales (and codes) of all weights together, learned on what the whole float model says of the text.

A layer's output error is a stand-in. Here the quantized decoder is a student whose next-token distribution shall be
the float one's, and gradients go through all of it: EfficientQAT's end-to-end phase (arXiv 2407.11062 §3.3), towards
the float model's distribution in place of the text's next token. The text would teach the student the text as well:
perplexity falls further than the distance to the float model does, and says less about the quantization.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from jquant.formats import block_shape, expand, pack, unpack
from jquant.io.load import Progress
from jquant.methods import Tuning
from jquant.models.decoder import Decoder, blocks
from jquant.qtensor import QTensor, dequantize, stored_grid

# Tokens whose logits are alive at a time.
ROWS = 256
Learned = dict[tuple[Any, ...], dict[str, Array]]  # by the kernel's path


def tune(
    quantized: Decoder,
    decoder: Decoder,
    tokens: Int[np.ndarray, "n context"],
    tuning: Tuning | None = None,
    *,
    progress: Progress | None = None,
) -> Decoder:
    """The quantized decoder with scales, and codes if asked, learned against the float one.

    Args:
      quantized: as `quantize_decoder` returns it; left untouched.
      decoder: the float decoder it was made from, transformed as it is: codes move from its weights.
      tokens: calibration windows.
      tuning: how.
      progress: called with ("tune", steps done, steps in all).

    Raises:
      InputError: nothing is quantized, or scales are quantized themselves.
    """
    tuning = tuning or Tuning()
    graph, state = nnx.split(quantized)
    params = flatten_mapping(nnx.to_pure_dict(state))
    weights = {path: leaf for path, leaf in params.items() if isinstance(leaf, QTensor)}
    _check(weights)
    rest = {path: leaf for path, leaf in params.items() if path not in weights}
    learned = {path: _start(q, tuning) for path, q in weights.items()}
    if tuning.code_rate:
        for path, w in _stacked_like(decoder, quantized).items():
            learned[path]["behind"] = _offset(weights[path], w)
    optimizer = _optimizer(tuning)
    moments = optimizer.init(learned)
    for number in range(tuning.steps):
        batch = np.take(tokens, range(number * tuning.windows, (number + 1) * tuning.windows), 0, mode="wrap")
        learned, moments, _ = _step(graph, decoder, rest, weights, batch, learned, moments, tuning)
        jax.block_until_ready(moments)
        if progress:
            progress("tune", number + 1, tuning.steps)
    final = {path: _finished(q, learned[path]) for path, q in weights.items()}
    return nnx.merge(graph, nnx.State(unflatten_mapping(params | final)))


def _check(weights: Mapping[tuple[Any, ...], QTensor]) -> None:
    if not weights:
        raise InputError("There is nothing to tune: the decoder holds no quantized weight.")
    for path, q in weights.items():
        if not isinstance(q.format.scale, str):
            raise InputError(f"{'.'.join(map(str, path))}: scales that are quantized themselves can't be tuned.")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Student:
    """A quantized kernel as a function of what is learned; a product decodes it and forgets the values at once."""

    weight: Any
    learned: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def __rmatmul__(self, x: Array) -> Array:
        product = jax.checkpoint(lambda x, q, learned: x @ _values(q, learned).astype(x.dtype))
        return product(x, self.weight, self.learned)


def _values(q: QTensor, learned: Mapping[str, Array]) -> Float[Array, "*l in out"]:
    """The weight under the learned scales; the gradient reaches what lies behind the codes straight through them."""
    block = block_shape(q.format, q.shape)
    wide = lambda v: expand(v, block, q.shape)  # noqa: E731
    at = jax.tree.map(wide, _grid(q, learned))
    if "behind" not in learned:
        return q.format.decode(unpack(q.codes, q.format.bits, q.in_features), *at)
    codes, inside = _codes(q, learned["behind"])
    step = jax.lax.stop_gradient(at[0].astype(jnp.float32)) * inside
    behind = learned["behind"]
    return q.format.decode(codes, *at) + step * (behind - jax.lax.stop_gradient(behind))


def _grid(q: QTensor, learned: Mapping[str, Array]) -> tuple[Array, Array | None]:
    scale, zero = stored_grid(q)
    new = scale.astype(jnp.float32) * jnp.exp(learned["log_scale"])
    if "shift" in learned:
        assert zero is not None
        return new, zero.astype(jnp.float32) + learned["shift"] * scale.astype(jnp.float32)
    return new, zero


def _codes(q: QTensor, behind: Float[Array, "*l in out"]) -> tuple[Array, Array]:
    """Codes on the grid before tuning of the old values moved by `behind` steps, and which stay within the grid."""
    at = jax.tree.map(lambda v: expand(v, block_shape(q.format, q.shape), q.shape), stored_grid(q))
    old = q.format.decode(unpack(q.codes, q.format.bits, q.in_features), *at)
    moved = old + jax.lax.stop_gradient(behind) * jnp.abs(at[0].astype(jnp.float32))
    ends = [q.format.decode(q.format.encode(jnp.float32(far), *at), *at) for far in (-3e38, 3e38)]
    return q.format.encode(moved, *at), ((moved >= ends[0]) & (moved <= ends[1])).astype(jnp.float32)


def _start(q: QTensor, tuning: Tuning) -> dict[str, Array]:
    scale, zero = stored_grid(q)
    learned = {"log_scale": jnp.zeros(scale.shape, jnp.float32)}
    if zero is not None and jnp.issubdtype(zero.dtype, jnp.floating):
        learned["shift"] = jnp.zeros(zero.shape, jnp.float32)
    return learned


@jax.jit
def _offset(q: QTensor, w: Float[Array, "*l in out"]) -> Float[Array, "*l in out"]:
    """Steps from each rounded value towards the float one, less than the half that would change the code.

    A weight whose nearest value it is not, because another rounding chose its code, starts next to the border.
    """
    scale = expand(stored_grid(q)[0], block_shape(q.format, q.shape), q.shape).astype(jnp.float32)
    steps = (w.astype(jnp.float32) - dequantize(q)) / jnp.where(scale == 0, 1, jnp.abs(scale))
    return jnp.clip(steps, -0.45, 0.45)


def _stacked_like(decoder: Decoder, quantized: Decoder) -> dict[tuple[Any, ...], Array]:
    """The float decoder's kernels, stacked in the quantized one's segments."""
    layers, found = list(blocks(decoder)), {}
    for number, segment in enumerate(quantized.segments):
        count = jax.tree.leaves(nnx.state(segment))[0].shape[0]
        run, layers = layers[:count], layers[count:]
        flat = [flatten_mapping(nnx.to_pure_dict(nnx.state(layer))) for layer in run]
        there = flatten_mapping(nnx.to_pure_dict(nnx.state(segment)))
        for path, leaf in there.items():
            if isinstance(leaf, QTensor):
                found["segments", number, *path] = jnp.stack([one[path] for one in flat])
    return found


@jax.jit
def _finished(q: QTensor, learned: Mapping[str, Array]) -> QTensor:
    """The learned weight in the format it had."""
    scale, zero = _grid(q, learned)
    tuned = replace(q, scale=scale.astype(q.scale.dtype))
    if "shift" in learned:
        assert zero is not None
        tuned = replace(tuned, zero=zero.astype(q.zero.dtype))
    if "behind" in learned:
        tuned = replace(tuned, codes=pack(_codes(q, learned["behind"])[0], q.format.bits))
    return tuned


def _optimizer(tuning: Tuning) -> optax.GradientTransformation:
    adam = lambda rate: optax.adam(optax.cosine_decay_schedule(rate, tuning.steps))  # noqa: E731
    rates: dict[Any, optax.GradientTransformation] = {
        "log_scale": adam(tuning.rate),
        "shift": adam(tuning.rate),
        "behind": adam(tuning.code_rate),
    }
    named = lambda learned: {path: {name: name for name in one} for path, one in learned.items()}  # noqa: E731
    return optax.multi_transform(rates, named)


@partial(jax.jit, static_argnames=("graph", "tuning"), donate_argnames=("learned", "moments"))
def _step(
    graph: Any,
    teacher: Decoder,
    rest: Mapping[tuple[Any, ...], Array],
    weights: Mapping[tuple[Any, ...], QTensor],
    tokens: Int[Array, "b t"],
    learned: Learned,
    moments: Any,
    tuning: Tuning,
) -> tuple[Learned, Any, Array]:
    """One of Adam's steps, and the loss before it."""

    def loss(learned: Learned) -> Array:
        students = {path: _Student(q, learned[path]) for path, q in weights.items()}
        student = nnx.merge(graph, nnx.State(unflatten_mapping({**rest, **students})))
        exact = teacher.hidden(tokens) if tuning.target == "model" else None
        return _loss(student, student.hidden(tokens), teacher, exact, tokens)

    value, slopes = jax.value_and_grad(loss)(learned)
    updates, moments = _optimizer(tuning).update(slopes, moments)
    return optax.apply_updates(learned, updates), moments, value  # pyright: ignore[reportReturnType]


def _loss(
    student: Decoder, hidden: Float[Array, "b t d"], teacher: Decoder, exact: Array | None, tokens: Int[Array, "b t"]
) -> Float[Array, ""]:
    """Mean KL divergence from the teacher, or cross-entropy, ROWS tokens' logits at a time."""
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    flat = lambda a: a[:, :-1].reshape(count, -1)  # noqa: E731
    columns = [flat(hidden), flat(hidden if exact is None else exact), tokens[:, 1:].reshape(count), jnp.ones(count)]
    fill = -count % ROWS
    chunks = [jnp.pad(a, [(0, fill)] + [(0, 0)] * (a.ndim - 1)).reshape(-1, ROWS, *a.shape[1:]) for a in columns]

    @jax.checkpoint
    def add(total: Array, chunk: Any) -> tuple[Array, None]:
        states, others, targets, real = chunk
        log_q = jax.nn.log_softmax(student.logits(states).astype(jnp.float32))
        if exact is None:
            each = -jnp.take_along_axis(log_q, targets[:, None], -1)[:, 0]
        else:
            log_p = jax.nn.log_softmax(teacher.logits(others).astype(jnp.float32))
            each = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
        return total + jnp.sum(each * real), None

    return jax.lax.scan(add, jnp.float32(0), tuple(chunks))[0] / count
