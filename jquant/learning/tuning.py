"""After rounding: scales (and codes) learned by gradients, block by block or through the whole model.

A layer's output error, which roundings minimise, is a stand-in for what the model says of the text, and so is a block's
(AutoRound, arXiv 2309.05516; EfficientQAT's first phase, arXiv 2407.11062 §3.2). Through the whole model the quantized
decoder is a student whose next-token distribution shall be the float one's: EfficientQAT's end-to-end phase (§3.3),
towards the float model's distribution in place of the text's next token. The text would teach the student the text as
well: perplexity falls further than the distance to the float model does, and says less about the quantization.
"""

from collections.abc import Callable, Mapping
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

from jquant.composition import Tuning
from jquant.data import check_tokens
from jquant.errors import InputError
from jquant.formats import block_shape, expand, pack, unpack
from jquant.learning.objectives import all_finite
from jquant.models.decoder import Block, Decoder
from jquant.progress import Progress, showing
from jquant.qtensor import QTensor, stored_grid
from jquant.rounding.limits import check_scales

# Tokens whose logits are alive at a time.
ROWS = 256
Learned = dict[tuple[Any, ...], dict[str, Array]]  # by the kernel's path


def tune(
    quantized: Decoder,
    decoder: Decoder,
    tokens: Int[np.ndarray, "n context"],
    tuning: Tuning | None = None,
    *,
    progress: Progress | bool = True,
) -> Decoder:
    """The quantized decoder with scales, and codes if asked, learned against the float one.

    Args:
      quantized: as `quantize_decoder` returns it; left untouched.
      decoder: the float decoder it was made from.
      tokens: calibration windows.
      tuning: how, with target "model".
      progress: see `Options`; a function is called with ("tune", steps done, steps in all) and the loss before it.

    Raises:
      InputError: nothing is quantized, or scales are quantized themselves; a tuning of single blocks; windows that the
        model can't read; a step whose loss or parameters are not finite.
    """
    tuning = tuning or Tuning()
    if tuning.target == "block":
        raise InputError('Blocks are tuned one by one as they are rounded (Method.tuning): target is not "block" here.')
    check_tokens(tokens, decoder.config, "Calibration windows")
    graph, rest, weights = _split(quantized)

    def slopes(learned: Learned, which: Int[np.ndarray, " windows"]) -> tuple[Array, Learned]:
        return _model_slopes(learned, graph, rest, weights, decoder, tokens[which], tuning.text)

    with showing(progress) as tell:
        final = _learn(weights, slopes, len(tokens), tuning, tell)
    return nnx.merge(graph, nnx.State(unflatten_mapping(rest | final)))


def tune_block(
    quantized: Block,
    inputs: Float[Array, "n context d"],
    outputs: Float[Array, "n context d"],
    rotary: Float[Array, "context half 2"],
    tuning: Tuning,
) -> Block:
    """The quantized block with scales, and codes if asked, learned to give the outputs.

    The loss is the squared error of each token's output over its squared length, averaged: a next block sees its input
    normalised, and one attention sink is a thousand times as long as the rest.

    Args:
      quantized: left untouched.
      inputs: calibration windows as the block reads them: from the quantized blocks before it.
      outputs: what the float block makes of the float model's.
      rotary: see `rotary_table`.
      tuning: how.

    Raises:
      InputError: nothing is quantized, or scales are quantized themselves; a step whose loss or parameters are not
        finite.
    """
    graph, rest, weights = _split(quantized)

    def slopes(learned: Learned, which: Int[np.ndarray, " windows"]) -> tuple[Array, Learned]:
        return _block_slopes(learned, graph, rest, weights, inputs, outputs, rotary, which)

    final = _learn(weights, slopes, len(inputs), tuning, None)
    return nnx.merge(graph, nnx.State(unflatten_mapping(rest | final)))


def _split(module: nnx.Module) -> tuple[Any, dict[tuple[Any, ...], Array], dict[tuple[Any, ...], QTensor]]:
    """Structure, parameters that stay, and quantized kernels."""
    graph, state = nnx.split(module)
    params = flatten_mapping(nnx.to_pure_dict(state))
    weights = {path: leaf for path, leaf in params.items() if isinstance(leaf, QTensor)}
    _check(weights)
    return graph, {path: leaf for path, leaf in params.items() if path not in weights}, weights


def _learn(
    weights: Mapping[tuple[Any, ...], QTensor],
    slopes: Callable[[Learned, Int[np.ndarray, " windows"]], tuple[Array, Learned]],
    windows: int,
    tuning: Tuning,
    progress: Progress | None,
) -> dict[tuple[Any, ...], QTensor]:
    """The weights after Adam's steps down the slopes, each over the next few windows."""
    learned = {path: _start(q, tuning) for path, q in weights.items()}
    moments = _optimizer(tuning).init(learned)
    for number in range(tuning.steps):
        which = np.arange(number * tuning.windows, (number + 1) * tuning.windows) % windows
        loss, slope = slopes(learned, which)
        learned, moments = _step(learned, slope, moments, tuning)
        loss, sound = jax.device_get((loss, all_finite(learned)))  # waits: one step's activations are alive at a time
        if not (np.isfinite(loss) and sound):
            raise InputError(
                f"Tuning of the {tuning.target}, step {number + 1} of {tuning.steps}: the loss ({loss:.4g}) or what is "
                f"learned is not finite; take a lower rate, or look for activations that overflow their dtype."
            )
        if progress:
            progress("tune", number + 1, tuning.steps, loss=float(loss))
    tuned = {path: _finished(q, learned[path]) for path, q in weights.items()}
    check_scales({".".join(map(str, path)): q for path, q in tuned.items()})
    return tuned


def _check(weights: Mapping[tuple[Any, ...], QTensor]) -> None:
    if not weights:
        raise InputError("There is nothing to tune: the decoder holds no quantized weight.")
    for path, q in weights.items():
        if not isinstance(q.format.scale, str):
            raise InputError(f"{'.'.join(map(str, path))}: scales that are quantized themselves can't be tuned.")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Student:
    """A quantized kernel as a function of what is learned; a product decodes it and forgets the values at once.

    Without anything learned, a float kernel.
    """

    weight: Any
    learned: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def __rmatmul__(self, x: Array) -> Array:
        decoded = lambda x, q, learned: product(x, q if learned is None else _values(q, learned))  # noqa: E731
        return jax.checkpoint(decoded)(x, self.weight, self.learned)


@jax.custom_vjp
def product(x: Float[Array, "*b in"], w: Float[Array, "in out"]) -> Float[Array, "*b out"]:
    """x @ w with both rounded to bfloat16 and float32 sums, and so backwards: half the time where hardware has it.

    What that loses, 2⁻⁹ of a factor, is little beside what even 4 bits do to a weight.
    """
    return _product_forward(x, w)[0]


def _product_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, ...]]:
    short = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    y = jnp.matmul(*short, preferred_element_type=jnp.float32).astype(x.dtype)
    return y, (*short, jnp.empty(0, x.dtype), jnp.empty(0, w.dtype))


def _product_backward(saved: tuple[Array, ...], slope: Array) -> tuple[Array, Array]:
    x, w, like_x, like_w = saved
    slope, flat = slope.astype(jnp.bfloat16), lambda a: a.reshape(-1, a.shape[-1])
    at_x = jnp.matmul(slope, w.T, preferred_element_type=jnp.float32)
    at_w = jnp.matmul(flat(x).T, flat(slope), preferred_element_type=jnp.float32)
    return at_x.astype(like_x.dtype), at_w.astype(like_w.dtype)


product.defvjp(_product_forward, _product_backward)


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
    if tuning.code_rate:
        learned["behind"] = jnp.zeros(q.shape, jnp.float32)
    return learned


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


@partial(jax.jit, static_argnames="tuning", donate_argnames=("learned", "moments"))
def _step(learned: Learned, slope: Learned, moments: Any, tuning: Tuning) -> tuple[Learned, Any]:
    updates, moments = _optimizer(tuning).update(slope, moments)
    return optax.apply_updates(learned, updates), moments  # pyright: ignore[reportReturnType]


@partial(jax.jit, static_argnames="graph")
def _block_slopes(
    learned: Learned,
    graph: Any,
    rest: Mapping[tuple[Any, ...], Array],
    weights: Mapping[tuple[Any, ...], QTensor],
    inputs: Float[Array, "n t d"],
    outputs: Float[Array, "n t d"],
    rotary: Array,
    which: Int[Array, " windows"],
) -> tuple[Array, Learned]:
    wanted = outputs[which].astype(jnp.float32)

    def loss(learned: Learned) -> Array:
        got = _student(graph, rest, weights, learned)(inputs[which], rotary)[0].astype(jnp.float32)
        return jnp.mean(jnp.sum((got - wanted) ** 2, -1) / jnp.maximum(jnp.sum(wanted**2, -1), 1e-12))

    return jax.value_and_grad(loss)(learned)


@partial(jax.jit, static_argnames=("graph", "text"))
def _model_slopes(
    learned: Learned,
    graph: Any,
    rest: Mapping[tuple[Any, ...], Array],
    weights: Mapping[tuple[Any, ...], QTensor],
    teacher: Decoder,
    tokens: Int[Array, "b t"],
    text: float,
) -> tuple[Array, Learned]:
    structure, state = nnx.split(teacher)
    params = flatten_mapping(nnx.to_pure_dict(state))
    kernels = {path: leaf for path, leaf in params.items() if path[0] == "segments" and path[-1] == "kernel"}
    exact = None
    if text < 1:
        exact = _student(structure, params, kernels, dict.fromkeys(kernels)).hidden(tokens)
    # Embedding and head are not quantized: student and teacher share them.
    head = teacher.embedding.get_value().T if teacher.head is None else teacher.head.kernel.get_value()

    def loss(learned: Learned) -> Array:
        return _loss(
            _student(graph, rest, weights, learned).hidden(tokens), exact, head.astype(jnp.bfloat16), tokens, text
        )

    return jax.value_and_grad(loss)(learned)


def _student(
    graph: Any,
    rest: Mapping[tuple[Any, ...], Array],
    weights: Mapping[tuple[Any, ...], Any],
    learned: Mapping[tuple[Any, ...], Any],
) -> Any:
    """The decoder or block, its kernels functions of what is learned, if anything, and multiplied by `product`."""
    students = {path: _Student(q, learned[path]) for path, q in weights.items()}
    return nnx.merge(graph, nnx.State(unflatten_mapping({**rest, **students})))


def _loss(
    hidden: Float[Array, "b t d"],
    exact: Float[Array, "b t d"] | None,
    head: Float[Array, "d vocab"],
    tokens: Int[Array, "b t"],
    text: float,
) -> Float[Array, ""]:
    """Mean KL divergence from the teacher, a share of it cross-entropy instead, ROWS tokens' logits at a time."""
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    flat = lambda a: a[:, :-1].reshape(count, -1)  # noqa: E731
    columns = [flat(hidden), flat(hidden if exact is None else exact), tokens[:, 1:].reshape(count), jnp.ones(count)]
    fill = -count % ROWS
    chunks = [jnp.pad(a, [(0, fill)] + [(0, 0)] * (a.ndim - 1)).reshape(-1, ROWS, *a.shape[1:]) for a in columns]

    @jax.checkpoint
    def add(total: Array, chunk: Any) -> tuple[Array, None]:
        states, others, targets, real = chunk
        log_q = jax.nn.log_softmax(product(states, head).astype(jnp.float32))
        each = -text * jnp.take_along_axis(log_q, targets[:, None], -1)[:, 0]
        if text < 1:
            log_p = jax.nn.log_softmax(product(others, head).astype(jnp.float32))
            each += (1 - text) * jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
        return total + jnp.sum(each * real), None

    return jax.lax.scan(add, jnp.float32(0), tuple(chunks))[0] / count
