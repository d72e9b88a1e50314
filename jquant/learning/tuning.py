"""Scales (and codes) learned by gradients after rounding, block by block or through the whole model.

Roundings minimise the error of one layer's outputs. Here the error is that of a block's outputs (AutoRound, arXiv
2309.05516; EfficientQAT's first phase, arXiv 2407.11062 §3.2), or of the whole model's predictions: EfficientQAT's
end-to-end phase (§3.3), with the float model's next-token distribution as target in place of the text's next token.
With the text as target the quantized model learns the text, too: its perplexity falls below what its distance to the
float model explains.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
from jquant.learning.objectives import all_finite, map_rows
from jquant.models.decoder import Block, Decoder
from jquant.progress import Progress, showing
from jquant.qtensor import QTensor, stored_grid
from jquant.rounding.limits import check_scales

Learned = dict[tuple[Any, ...], dict[str, Array]]  # by the kernel's path


def tune(
    quantized: Decoder,
    decoder: Decoder,
    tokens: Int[np.ndarray, "n context"],
    tuning: Tuning | None = None,
    *,
    progress: Progress | bool = True,
) -> Decoder:
    """The quantized decoder with scales, and codes if `tuning.code_rate` says so, learned to match the float one.

    Args:
      quantized: as `quantize_decoder` returns it; left untouched.
      decoder: the float decoder it was made from.
      tokens: calibration windows.
      tuning: a stage with target "model"; `Tuning()` by default.
      progress: see `Options`; a function is called with ("tune", steps done, steps in all) and the loss before that
        step.

    Raises:
      InputError: nothing is quantized, or scales are quantized themselves; a tuning with target "block"; windows that
        the model can't read; a step whose loss or parameters are not finite.
    """
    tuning = tuning or Tuning()
    if tuning.target == "block":
        raise InputError('Blocks are tuned one by one as they are rounded (Method.tuning): target is not "block" here.')
    check_tokens(tokens, decoder.config, "Calibration windows")
    parts = _split(quantized)

    def slopes(learned: Learned, which: Int[np.ndarray, " windows"]) -> tuple[Array, Learned]:
        return _model_slopes(learned, parts, decoder, tokens[which], tuning.text)

    with showing(progress) as tell:
        return parts.merge(_learn(parts.kernels, slopes, len(tokens), tuning, tell))


def tune_block(
    quantized: Block,
    inputs: Float[Array, "n context d"],
    outputs: Float[Array, "n context d"],
    rotary: Float[Array, "context half 2"],
    tuning: Tuning,
) -> Block:
    """The quantized block with scales, and codes if `tuning.code_rate` says so, learned to match the float one.

    The loss is the mean over tokens of the output's squared error over its squared length. The next block normalises
    its input, so relative errors count; and an attention sink is a thousand times as long as other tokens.

    Args:
      quantized: left untouched.
      inputs: what the quantized blocks before it produce from the calibration windows.
      outputs: what the float blocks, up to this one, produce from them.
      rotary: see `rotary_table`.
      tuning: a stage with target "block".

    Raises:
      InputError: nothing is quantized, or scales are quantized themselves; a step whose loss or parameters are not
        finite.
    """
    parts = _split(quantized)

    def slopes(learned: Learned, which: Int[np.ndarray, " windows"]) -> tuple[Array, Learned]:
        return _block_slopes(learned, parts, inputs[which], outputs[which], rotary)

    return parts.merge(_learn(parts.kernels, slopes, len(inputs), tuning, None))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Parts:
    """A module in parts: its structure, the kernels that are learned or have quantized counterparts, and the rest."""

    graph: Any = field(metadata={"static": True})
    kernels: Any  # path -> kernel
    rest: Any  # path -> array

    def merge(self, kernels: Mapping[tuple[Any, ...], Any]) -> Any:
        """The module with other kernels."""
        return nnx.merge(self.graph, nnx.State(unflatten_mapping({**self.rest, **kernels})))

    def student(self, learned: Mapping[tuple[Any, ...], Any]) -> Any:
        """The module with kernels decoded under what is learned (if anything) and multiplied by `product`."""
        return self.merge({path: _Student(kernel, learned[path]) for path, kernel in self.kernels.items()})


def _split(module: nnx.Module) -> _Parts:
    """A quantized module in parts."""
    graph, state = nnx.split(module)
    params = flatten_mapping(nnx.to_pure_dict(state))
    kernels = {path: leaf for path, leaf in params.items() if isinstance(leaf, QTensor)}
    _check(kernels)
    return _Parts(graph, kernels, {path: leaf for path, leaf in params.items() if path not in kernels})


def _learn(
    kernels: Mapping[tuple[Any, ...], QTensor],
    slopes: Callable[[Learned, Int[np.ndarray, " windows"]], tuple[Array, Learned]],
    windows: int,
    tuning: Tuning,
    progress: Progress | None,
) -> dict[tuple[Any, ...], QTensor]:
    """The kernels after Adam's steps down the slopes, each over the next few windows."""
    learned = {path: _start(q, tuning) for path, q in kernels.items()}
    moments = _optimizer(tuning).init(learned)
    for number in range(tuning.steps):
        which = np.arange(number * tuning.windows, (number + 1) * tuning.windows) % windows
        loss, slope = slopes(learned, which)
        learned, moments = _step(learned, slope, moments, tuning)
        loss, finite = jax.device_get((loss, all_finite(learned)))  # waits: one step's activations are alive at a time
        if not (np.isfinite(loss) and finite):
            raise InputError(
                f"Tuning of the {tuning.target}, step {number + 1} of {tuning.steps}: the loss ({loss:.4g}) or what is "
                f"learned is not finite; take a lower rate, or look for activations that overflow their dtype."
            )
        if progress:
            progress("tune", number + 1, tuning.steps, loss=float(loss))
    tuned = {path: _finished(q, learned[path]) for path, q in kernels.items()}
    check_scales({".".join(map(str, path)): q for path, q in tuned.items()})
    return tuned


def _check(kernels: Mapping[tuple[Any, ...], QTensor]) -> None:
    if not kernels:
        raise InputError("There is nothing to tune: the decoder holds no quantized weight.")
    for path, q in kernels.items():
        if not isinstance(q.format.scale, str):
            raise InputError(f"{'.'.join(map(str, path))}: scales that are quantized themselves can't be tuned.")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Student:
    """A quantized kernel that each `x @ kernel` decodes anew under what is learned.

    If `learned` is None, the kernel is a float array.
    """

    kernel: Any
    learned: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def __rmatmul__(self, x: Array) -> Array:
        decoded = lambda x, q, learned: product(x, q if learned is None else _values(q, learned))  # noqa: E731
        return jax.checkpoint(decoded)(x, self.kernel, self.learned)


@jax.custom_vjp
def product(x: Float[Array, "*b in"], w: Float[Array, "in out"]) -> Float[Array, "*b out"]:
    """x @ w with both factors rounded to bfloat16 and sums in float32; so are the products of its gradient.

    It takes half the time on hardware with bfloat16 products. Rounding to bfloat16 changes a factor by at most 2⁻⁹ of
    itself; 4-bit quantization changes a weight by far more.
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
    """The weight decoded under what is learned; the gradient of `behind` passes straight through the codes."""
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
    tuned_scale = scale.astype(jnp.float32) * jnp.exp(learned["log_scale"])
    if "shift" in learned:
        assert zero is not None
        return tuned_scale, zero.astype(jnp.float32) + learned["shift"] * scale.astype(jnp.float32)
    return tuned_scale, zero


def _codes(q: QTensor, behind: Float[Array, "*l in out"]) -> tuple[Array, Array]:
    """Codes of the old values moved by `behind` steps, on the grid before tuning, and 1 for those within the grid."""
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
    named = lambda learned: {path: dict(zip(values, values, strict=True)) for path, values in learned.items()}  # noqa: E731
    return optax.multi_transform(rates, named)


@partial(jax.jit, static_argnames="tuning", donate_argnames=("learned", "moments"))
def _step(learned: Learned, slope: Learned, moments: Any, tuning: Tuning) -> tuple[Learned, Any]:
    updates, moments = _optimizer(tuning).update(slope, moments)
    return optax.apply_updates(learned, updates), moments  # pyright: ignore[reportReturnType]


@jax.jit
def _block_slopes(
    learned: Learned, parts: _Parts, inputs: Float[Array, "b t d"], outputs: Float[Array, "b t d"], rotary: Array
) -> tuple[Array, Learned]:
    outputs = outputs.astype(jnp.float32)

    def loss(learned: Learned) -> Array:
        predicted = parts.student(learned)(inputs, rotary)[0].astype(jnp.float32)
        return jnp.mean(jnp.sum((predicted - outputs) ** 2, -1) / jnp.maximum(jnp.sum(outputs**2, -1), 1e-12))

    return jax.value_and_grad(loss)(learned)


@partial(jax.jit, static_argnames="text")
def _model_slopes(
    learned: Learned, parts: _Parts, teacher: Decoder, tokens: Int[Array, "b t"], text: float
) -> tuple[Array, Learned]:
    exact = _exact_hidden(teacher, tokens) if text < 1 else None
    # Embedding and head are not quantized: student and teacher share them.
    head = teacher.embedding.get_value().T if teacher.head is None else teacher.head.kernel.get_value()

    def loss(learned: Learned) -> Array:
        return _loss(parts.student(learned).hidden(tokens), exact, head.astype(jnp.bfloat16), tokens, text)

    return jax.value_and_grad(loss)(learned)


def _exact_hidden(teacher: Decoder, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """The float model's final states, with products in bfloat16 like the student's."""
    graph, state = nnx.split(teacher)
    params = flatten_mapping(nnx.to_pure_dict(state))
    kernels = {path: leaf for path, leaf in params.items() if path[0] == "segments" and path[-1] == "kernel"}
    rest = {path: leaf for path, leaf in params.items() if path not in kernels}
    return _Parts(graph, kernels, rest).student(dict.fromkeys(kernels)).hidden(tokens)


def _loss(
    hidden: Float[Array, "b t d"],
    exact: Float[Array, "b t d"] | None,
    head: Float[Array, "d vocab"],
    tokens: Int[Array, "b t"],
    text: float,
) -> Float[Array, ""]:
    """(1 − text) · mean KL divergence from the teacher + text · mean cross-entropy, nats."""

    @jax.checkpoint
    def rows(states: Array, others: Array, targets: Array) -> Array:
        log_q = jax.nn.log_softmax(product(states, head).astype(jnp.float32))
        # optax's cross-entropy would normalise the logits a second time.
        loss = -text * jnp.take_along_axis(log_q, targets[:, None], -1)[:, 0]
        if text < 1:
            log_p = jax.nn.log_softmax(product(others, head).astype(jnp.float32))
            loss += (1 - text) * optax.losses.kl_divergence_with_log_targets(log_q, log_p)
        return loss

    others = hidden if exact is None else exact
    return jnp.mean(map_rows(rows, hidden[:, :-1], others[:, :-1], tokens[:, 1:]))
