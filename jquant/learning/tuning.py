"""Training with the quantizer in the loop: scales, zeros and weights, block by block or through the whole model.

Roundings minimise the error of one layer's outputs. Here the error is that of a block's outputs (AutoRound, arXiv
2309.05516; EfficientQAT's first phase, arXiv 2407.11062 §3.2), or of the whole model's predictions: EfficientQAT's
end-to-end phase (§3.3), with the float model's next-token distribution as target in place of the text's next token.
With the text as target the quantized model learns the text, too: its perplexity falls below what its distance to the
float model explains.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
from jquant.kernels.bfloat16 import bfloat16_matmul
from jquant.learning import loop
from jquant.learning.fake_quant import FakeQuantized, fake_quant_inputs, has_integer_zero
from jquant.learning.loop import Learned
from jquant.learning.objectives import map_rows
from jquant.models.decoder import Block, Decoder
from jquant.models.params import Packed
from jquant.progress import Progress, showing
from jquant.qtensor import QTensor, dequantize
from jquant.rounding.limits import check_scales


def tune(
    quantized: Decoder,
    decoder: Decoder,
    tokens: Int[np.ndarray, "n context"],
    tuning: Tuning | None = None,
    *,
    progress: Progress | bool = True,
) -> Decoder:
    """The quantized decoder with scales, and codes if `tuning.weight_rate` says so, learned to match the float one.

    Args:
      quantized: as `quantize_decoder` returns it; left untouched.
      decoder: the float decoder it was made from.
      tokens: calibration windows.
      tuning: a stage with target "model"; `Tuning()` by default.
      progress: see `Options`; a function is called with ("tune", steps done, steps in all) and the loss before that
        step.

    Raises:
      InputError: nothing is quantized; a tuning with target "block"; windows that the model can't read; a step whose
        loss or parameters are not finite.
    """
    tuning = tuning or Tuning()
    if tuning.target == "block":
        raise InputError('Blocks are tuned one by one as they are rounded (Method.tuning): target is not "block" here.')
    check_tokens(tokens, decoder.config, "Calibration windows")
    student = split(quantized)
    batch = lambda which: tokens[which]  # noqa: E731
    with showing(progress) as tell:
        return _learn(student, (student, decoder), batch, len(tokens), model_loss, tuning, tell)


def tune_block(
    quantized: Block,
    inputs: Float[Array, "n context d"],
    outputs: Float[Array, "n context d"],
    rotary: Float[Array, "context half 2"],
    tuning: Tuning,
) -> Block:
    """The quantized block with scales, and codes if `tuning.weight_rate` says so, learned to match the float one.

    The loss is the mean over tokens of the output's squared error over its squared length. The next block normalises
    its input, so relative errors count; and an attention sink is a thousand times as long as other tokens.

    Args:
      quantized: left untouched.
      inputs: what the quantized blocks before it produce from the calibration windows.
      outputs: what the float blocks, up to this one, produce from them.
      rotary: see `rotary_table`.
      tuning: a stage with target "block".

    Raises:
      InputError: nothing is quantized; a step whose loss or parameters are not finite.
    """
    student = split(quantized)
    batch = lambda which: (inputs[which], outputs[which])  # noqa: E731
    return _learn(student, (student, rotary), batch, len(inputs), block_loss, tuning, None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Student:
    """A quantized module in parts: its structure, its quantized kernels, and the rest.

    Attributes:
      graph: the module's structure (static).
      kernels: path -> `FakeQuantized`.
      rest: path -> array.
    """

    graph: Any = field(metadata={"static": True})
    kernels: Any
    rest: Any

    def module(self, learned: Learned) -> Any:
        """The module with fake-quantized kernels under what is learned."""
        kernels = {path: replace(kernel, learned=learned.get(path, {})) for path, kernel in self.kernels.items()}
        return self._merged(kernels, learned)

    def packed(self, learned: Learned) -> Any:
        """The module with quantized kernels."""
        kernels = {path: _pack(replace(kernel, learned=learned.get(path, {}))) for path, kernel in self.kernels.items()}
        check_scales({".".join(map(str, path)): q for path, q in kernels.items()})
        return self._merged(kernels, learned)

    def _merged(self, kernels: Mapping[tuple[Any, ...], Any], learned: Learned) -> Any:
        norms = {path: each["norm"] for path, each in learned.items() if "norm" in each}
        return nnx.merge(self.graph, nnx.State(unflatten_mapping({**self.rest, **norms, **kernels})))


def split(quantized: nnx.Module) -> Student:
    """A quantized module in parts.

    Raises:
      InputError: nothing is quantized.
    """
    graph, state = nnx.split(quantized)
    params = flatten_mapping(nnx.to_pure_dict(state))
    kernels = {path: FakeQuantized.of(leaf) for path, leaf in params.items() if isinstance(leaf, QTensor)}
    if not kernels:
        raise InputError("There is nothing to tune: the decoder holds no quantized weight.")
    return Student(graph, kernels, {path: leaf for path, leaf in params.items() if path not in kernels})


def _learn(
    student: Student,
    frozen: tuple[Student, Any],
    batch: Callable[[Int[np.ndarray, " windows"]], Any],
    count: int,
    loss: loop.Loss,
    tuning: Tuning,
    progress: Progress | None,
) -> Any:
    """The module after the optimizer's steps, each over the next few of `count` windows."""
    learned = initial(student, tuning)
    if tuning.weight_rate:  # the codes are those of the weights from now on
        frozen = (replace(student, kernels={p: replace(k, codes=None) for p, k in student.kernels.items()}), frozen[1])
    state = loop.start(learned, tuning)
    del learned
    for number in range(tuning.steps):
        state, value, finite = loop.step(
            state, frozen, batch(loop.windows_of(number, count, tuning)), loss=loss, stage=tuning
        )
        if not finite:  # waits: one step's activations are alive at a time
            raise InputError(
                f"Tuning of the {tuning.target}, step {number + 1} of {tuning.steps}: the loss ({value:.4g}) or what is "
                f"learned is not finite; take a lower rate, or look for activations that overflow their dtype."
            )
        if progress:
            progress("tune", number + 1, tuning.steps, loss=float(value))
    return frozen[0].packed(state.learned)


def initial(student: Student, tuning: Tuning) -> Learned:
    """What is learned, at the start."""
    learned: Learned = {}
    for path, kernel in student.kernels.items():
        learned[path] = {"log_scale": jnp.zeros(kernel.scale.shape, jnp.float32)}
        if kernel.zero is not None and (tuning.weight_rate or not has_integer_zero(kernel.format)):
            learned[path]["shift"] = jnp.zeros(kernel.zero.shape, jnp.float32)
        if tuning.weight_rate:
            learned[path]["weight"] = _weight(kernel)
    if tuning.norm_rate:
        norms = {path: leaf for path, leaf in student.rest.items() if "norm" in str(path[-2])}
        learned |= {path: {"norm": jnp.array(leaf)} for path, leaf in norms.items()}
    return learned


@jax.jit
def _weight(kernel: FakeQuantized) -> Float[Array, "*l in out"]:
    return kernel.value() / kernel.steps


@jax.jit
def _pack(kernel: FakeQuantized) -> QTensor:
    return kernel.pack()


def block_loss(learned: Learned, frozen: Any, batch: Any, tuning: Tuning) -> Float[Array, ""]:
    """Mean over tokens of the squared error of a block's output over its squared length."""
    (student, rotary), (inputs, outputs) = frozen, batch
    outputs = outputs.astype(jnp.float32)
    predicted = student.module(learned)(inputs, rotary)[0].astype(jnp.float32)
    return jnp.mean(jnp.sum((predicted - outputs) ** 2, -1) / jnp.maximum(jnp.sum(outputs**2, -1), 1e-12))


def model_loss(learned: Learned, frozen: Any, tokens: Int[Array, "b t"], tuning: Tuning) -> Float[Array, ""]:
    """(1 − text) · mean KL divergence from the teacher + text · mean cross-entropy, nats."""
    student, teacher = frozen
    exact = None if tuning.text == 1 else jax.lax.stop_gradient(_with_products(teacher).hidden(tokens))
    # Embedding and head are not quantized: student and teacher share them.
    head = teacher.embedding.get_value().T if teacher.head is None else teacher.head.kernel.get_value()
    return _loss(student.module(learned).hidden(tokens, remat=True), exact, head.astype(jnp.bfloat16), tokens, tuning)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Product:
    """A frozen kernel, an array or a `QTensor`, that multiplies in bfloat16 and passes gradients to its inputs."""

    w: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.w.shape

    def __rmatmul__(self, x: Array) -> Array:
        if isinstance(self.w, QTensor) and self.w.activation is not None:
            x = fake_quant_inputs(x, self.w.activation, self.w.input_scale)
        return bfloat16_matmul(x, dequantize(self.w) if isinstance(self.w, QTensor) else self.w)


def _with_products(teacher: Decoder) -> Decoder:
    """The float model, with products in bfloat16 like the student's."""
    graph, state = nnx.split(teacher)
    params = flatten_mapping(nnx.to_pure_dict(state))
    wrapped = {
        path: Product(leaf) if path[0] == "segments" and path[-1] == "kernel" else leaf for path, leaf in params.items()
    }
    return nnx.merge(graph, nnx.State(unflatten_mapping(wrapped)))


def _loss(
    hidden: Float[Array, "b t d"],
    exact: Float[Array, "b t d"] | None,
    head: Float[Array, "d vocab"],
    tokens: Int[Array, "b t"],
    tuning: Tuning,
) -> Float[Array, ""]:
    text = tuning.text

    @jax.checkpoint
    def rows(states: Array, others: Array, targets: Array) -> Array:
        log_q = jax.nn.log_softmax(bfloat16_matmul(states, head).astype(jnp.float32))
        # optax's cross-entropy would normalise the logits a second time.
        loss = -text * jnp.take_along_axis(log_q, targets[:, None], -1)[:, 0]
        if text < 1:
            log_p = jax.nn.log_softmax(bfloat16_matmul(others, head).astype(jnp.float32))
            forward = optax.losses.kl_divergence_with_log_targets(log_q, log_p)
            if tuning.reverse:
                backward = optax.losses.kl_divergence_with_log_targets(log_p, log_q)
                share = tuning.reverse
                if share == "confidence":
                    share = jnp.mean(jnp.exp(jnp.take_along_axis(log_p, targets[:, None], -1)))
                forward = (1 - share) * forward + share * backward
            loss += (1 - text) * forward
        return loss

    others = hidden if exact is None else exact
    return jnp.mean(map_rows(rows, hidden[:, :-1], others[:, :-1], tokens[:, 1:]))
