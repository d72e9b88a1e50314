"""The loss of training through the whole model: shares of forward and reverse KL divergence and of cross-entropy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx.traversals import flatten_mapping, unflatten_mapping
from jax import Array
from jaxtyping import Float, Int

from jquant.activations import fake_quant_inputs
from jquant.composition import Tuning
from jquant.kernels.bfloat16 import matmul_in
from jquant.learning.objectives import map_rows
from jquant.models.decoder import Decoder, soft_capped
from jquant.qtensor import QTensor, Turned, dequantize

Head = Callable[[Float[Array, "rows d"]], Float[Array, "rows vocab"]]


def model_loss(learned: Any, frozen: Any, batch: Any, tuning: Tuning) -> Float[Array, ""]:
    """(1 − text) · mean KL divergence from the teacher + text · mean cross-entropy, nats.

    Args:
      learned: what is learned.
      frozen: the student, whose `module` takes what is learned, and the teacher.
      batch: windows, with the teacher's likeliest tokens under `top_k` (`teacher.batches_of`).
      tuning: the stage.
    """
    (student, teacher), tokens = frozen, batch[0] if isinstance(batch, tuple) else batch
    if isinstance(batch, tuple):
        known = batch[1:]
    elif tuning.text == 1:
        known = ()
    else:
        states = computing_in(tuning.compute, teacher).hidden(tokens)
        known = (jax.lax.stop_gradient(states[:, :-1]),)
    head = head_of(teacher, tuning.compute)
    states = student.module(learned, tuning.compute).hidden(tokens, remat=True)
    return _loss(states[:, :-1], tokens[:, 1:], known, head, tuning)


def head_of(decoder: Decoder, compute: str) -> Head:
    """A function from final states to logits, its products' factors in `compute`.

    Embedding and head are not quantized: student and teacher share them.
    """
    w = decoder.embedding.get_value().T if decoder.head is None else decoder.head.kernel.get_value()
    w = w.astype(compute)  # once, not for every chunk of tokens
    return lambda states: soft_capped(matmul_in(compute, states, w), decoder.config.logits_softcap)


def _loss(
    states: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    known: tuple[Array, ...],
    head: Head,
    tuning: Tuning,
) -> Float[Array, ""]:
    """The loss of the student's states; `known` is nothing, the teacher's states, or its likeliest tokens.

    A chunk's logits give its loss and the gradient of its states at once, so the backward pass needs no logits again:
    without it the products and exponentials of every chunk would be computed twice.
    """
    text, share = tuning.text, tuning.reverse
    if share == "confidence":
        share = jnp.mean(jnp.exp(map_rows(lambda s, t: _of(jax.nn.log_softmax(head(s)), t), *known, targets)))

    def rows(states: Array, targets: Array, *known: Array) -> Float[Array, " rows"]:
        log_q = jax.nn.log_softmax(head(states))
        # optax's cross-entropy would normalise the logits a second time.
        of_text = -text * _of(log_q, targets) if text else jnp.zeros(len(states))
        if text == 1:
            return of_text
        if tuning.top_k is None:
            log_p = jax.nn.log_softmax(head(known[0]))
        else:
            log_p, ids = known
            log_p, log_q = _with_others(log_p), _with_others(jnp.take_along_axis(log_q, ids, -1))
        forward = (1 - share) * optax.losses.kl_divergence_with_log_targets(log_q, log_p)
        backward = share * optax.losses.kl_divergence_with_log_targets(log_p, log_q) if tuning.reverse else 0.0
        return (1 - text) * (forward + backward) + of_text

    def rows_and_slopes(states: Array, *others: Array) -> tuple[Array, Array]:
        values, back = jax.vjp(lambda states: rows(states, *others), states)
        return values, back(jnp.ones_like(values))[0]

    fixed = jax.lax.stop_gradient(states)
    values, slopes = map_rows(rows_and_slopes, fixed, targets, *known)
    # states - fixed is 0, and has the gradient of the states.
    return jnp.mean(values) + jnp.sum(jax.lax.stop_gradient(slopes / values.size) * (states - fixed))


def _of(log: Float[Array, "rows vocab"], targets: Int[Array, " rows"]) -> Float[Array, " rows"]:
    return jnp.take_along_axis(log, targets[:, None], -1)[:, 0]


def _with_others(log: Float[Array, "rows k"]) -> Float[Array, "rows k+1"]:
    """Log-probabilities of some tokens, and that of all others together, which is at least log 1e-6."""
    rest = jnp.maximum(1 - jnp.sum(jnp.exp(log), -1, keepdims=True), 1e-6)
    return jnp.concatenate([log, jnp.log(rest)], -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Product:
    """A frozen kernel, an array or a `QTensor`, that multiplies as `compute` says; gradients pass to its inputs."""

    w: Any
    compute: str = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.w.shape

    def __rmatmul__(self, x: Array) -> Array:
        if isinstance(self.w, QTensor) and self.w.rotations is not None:
            return x @ Turned(Product(replace(self.w, rotations=None), self.compute), self.w.rotations)
        if isinstance(self.w, QTensor) and self.w.activation is not None:
            x = fake_quant_inputs(x, self.w.activation, self.w.input_scale)
        w = dequantize(self.w) if isinstance(self.w, QTensor) else self.w
        return matmul_in(self.compute, x, w).astype(x.dtype)


def computing_in(compute: str, decoder: Decoder) -> Decoder:
    """A float decoder whose products have factors in `compute`."""
    graph, state = nnx.split(decoder)
    return nnx.merge(graph, nnx.State(unflatten_mapping(computing(flatten_mapping(nnx.to_pure_dict(state)), compute))))


def computing(params: Mapping[tuple[Any, ...], Any], compute: str) -> dict[tuple[Any, ...], Any]:
    """A decoder's parameters, its projections with products that have factors in `compute`."""
    is_kernel = lambda path: path[0] == "segments" and path[-1] == "kernel"  # noqa: E731
    return {path: Product(leaf, compute) if is_kernel(path) else leaf for path, leaf in params.items()}
