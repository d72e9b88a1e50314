"""Training with the quantizer in the loop: scales, zeros and weights, block by block or through the whole model.

Roundings minimise the error of one layer's outputs. Here the error is that of a block's outputs (AutoRound, arXiv
2309.05516; EfficientQAT's first phase, arXiv 2407.11062 §3.2), or of the whole model's predictions: EfficientQAT's
end-to-end phase (§3.3), with the float model's next-token distribution as target in place of the text's next token.
With the text as target the quantized model learns the text, too: its perplexity falls, and its distance to the float
model may grow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.traversals import flatten_mapping, unflatten_mapping
from jax import Array
from jaxtyping import Float, Int

from jquant import provenance
from jquant.composition import Tuning
from jquant.data import check_tokens
from jquant.errors import InputError
from jquant.formats import Codebook
from jquant.learning.fake_quant import FakeQuantized, has_integer_zero
from jquant.learning.journal import Journal, opened
from jquant.learning.loop import Learned, Task, fit
from jquant.learning.losses import model_loss
from jquant.learning.teacher import batches_of, check_top_k
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder, identity
from jquant.parallel.mesh import Devices
from jquant.progress import Progress, showing
from jquant.qtensor import QTensor, Transposed
from jquant.rounding.limits import check_scales


def tune(
    quantized: Decoder,
    decoder: Decoder,
    tokens: Int[np.ndarray, "n context"],
    tuning: Tuning | None = None,
    *,
    journal: Journal | None = None,
    devices: Devices | None = None,
    progress: Progress | bool = True,
) -> Decoder:
    """The quantized decoder with scales, zeros and weights learned as `tuning` says.

    Args:
      quantized: as `quantize_decoder` returns it; left untouched.
      decoder: the float decoder it was made from, whose predictions are the target.
      tokens: windows of text.
      tuning: a stage with target "model"; `Tuning()` by default.
      journal: where checkpoints and metrics go; the same call goes on after a kill, and ends with the same bytes.
      devices: the mesh over which parameters, optimizer state and windows are split.
      progress: see `Options`; a function is called with ("tune", steps done, steps in all), the loss before that step
        (nats a token) and the speed (tokens a second, with compilation).

    Raises:
      InputError: nothing is quantized; a tuning with target "block", with a level_rate where nothing has a codebook, or
        with a top_k not below the vocabulary; windows that the model can't read, that leave no
        prediction, or that don't divide over the mesh; a float decoder with another embedding or head; weights that
        can't begin at float ones; a step whose loss or parameters are not finite; scales that don't fit their dtype; a
        journal's folder that holds another training or can't be written.
    """
    tuning = tuning or Tuning()
    if tuning.target == "block":
        raise InputError('Blocks are tuned one by one as they are rounded (Method.tuning): target is not "block" here.')
    check_windows(tokens, decoder.config)
    check_devices(tuning, devices)
    check_teacher(quantized, decoder)
    check_top_k(tuning, decoder.config)
    start, student = begun(split(quantized), tuning, decoder)
    (count, context), name = tokens.shape, "Tuning of the model"
    describe = partial(run_of, {"quantized": quantized, "float": decoder}, tokens, tuning, devices, __name__)
    with showing(progress) as tell, opened(journal, describe) as writer:
        teacher, batch_of = batches_of(decoder, tokens, tuning, tell)
        frozen, batch = (student, teacher), lambda _, which: batch_of(which)
        task = Task(name, start, model_loss, frozen, batch, count, context, student.packed, devices)
        return student.packed(fit(task, tuning, writer, tell))


def check_windows(tokens: Any, config: DecoderConfig) -> None:
    """Raises InputError for windows that the model can't read, or that hold no prediction to learn."""
    check_tokens(tokens, config, "Windows to learn from")
    if tokens.shape[1] < 2:
        raise InputError("Windows of 1 token leave no prediction to learn.")


def check_teacher(student: Decoder, teacher: Decoder) -> None:
    """Raises InputError unless both have the same embedding and head, which the loss shares."""
    heads = [None if decoder.head is None else decoder.head.kernel.get_value() for decoder in (student, teacher)]
    embeddings = [decoder.embedding.get_value() for decoder in (student, teacher)]
    for name, (ours, theirs) in {"embedding": embeddings, "head": heads}.items():
        if isinstance(ours, QTensor | Transposed):
            raise InputError(f"The {name} is quantized: train first, and quantize the {name} of the result.")
        if (ours is None) != (theirs is None) or (ours is not None and not jnp.array_equal(ours, theirs)):
            raise InputError(f"The teacher's {name} differs from the model's: they share embedding and head.")


def check_devices(tuning: Tuning, devices: Devices | None) -> None:
    """Raises InputError unless a step's windows divide over the mesh."""
    together = tuning.windows // tuning.accumulate
    if devices and together % devices.data:
        raise InputError(
            f"windows / accumulate = {together} is no multiple of the mesh's data={devices.data}: give Tuning others."
        )


def run_of(
    modules: Mapping[str, Any], tokens: np.ndarray, tuning: Tuning, devices: Devices | None, code: str
) -> dict[str, Any]:
    """What decides the bytes of a training's result: modules, tokens, the stage, the mesh, and the code's module."""
    return {
        "tuning": provenance.describe(tuning),
        "tokens": provenance.array_digest(tokens),
        **{name: None if module is None else identity(module) for name, module in modules.items()},
        "code": provenance.code_of(tuning, [code]),
        "packages": provenance.packages(),
        "mesh": [devices.data, devices.model] if devices else [1, 1],
        "device": jax.devices()[0].device_kind,
    }


def tune_block(
    quantized: Block,
    inputs: Float[Array, "n context d"],
    outputs: Float[Array, "n context d"],
    rotary: Float[Array, "ropes context half 2"],
    tuning: Tuning,
    exact: Block | None = None,
) -> Block:
    """The quantized block with scales, and codes if `tuning.weight_rate` says so, learned to match the float one.

    The loss is the mean over tokens of ‖ŷ − y‖² / ‖y‖², y the float block's output. The next block normalises its
    input, so relative errors count; and attention sinks, far longer than other tokens, count as one token each.

    Args:
      quantized: left untouched.
      inputs: what the quantized blocks before it produce from the calibration windows.
      outputs: what the float blocks, up to this one, produce from them.
      rotary: see `rotary_table`.
      tuning: a stage with target "block".
      exact: the float block, at whose weights those behind the codes begin if `tuning.begin` says so.

    Raises:
      InputError: nothing is quantized; a step whose loss or parameters are not finite.
    """
    start, student = begun(split(quantized), tuning, quantized if exact is None else exact)
    batch = lambda _, which: (inputs[which], outputs[which])  # noqa: E731
    count, context = inputs.shape[:2]
    name, frozen = "Tuning of the block", (student, rotary)
    return student.packed(fit(Task(name, start, block_loss, frozen, batch, count, context, student.packed), tuning))


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

    def module(self, learned: Learned, compute: str = "float32") -> Any:
        """The module with fake-quantized kernels under what is learned, whose products have factors in `compute`."""

        def with_learned(kernel: FakeQuantized, own: Mapping[str, Array]) -> FakeQuantized:
            # Layers are stacked on the first axis, and share the levels of their format.
            layers = kernel.scale.shape[:-2]
            if "level" in own and kernel.table is None:
                own = {**own, "level": jnp.broadcast_to(own["level"], (*layers, len(own["level"])))}
            return replace(kernel, learned=own, compute=compute)

        kernels = {path: with_learned(kernel, learned.get(path, {})) for path, kernel in self.kernels.items()}
        return self._merged(kernels, learned)

    def packed(self, learned: Learned) -> Any:
        """The module with quantized kernels."""
        settled = {path: replace(leaf, learned=learned.get(path, {})).settled() for path, leaf in self.kernels.items()}
        kernels = {path: _pack(kernel) for path, kernel in settled.items()}
        check_scales({".".join(map(str, path)): q for path, q in kernels.items()})
        return self._merged(kernels, learned)

    def _merged(self, kernels: Mapping[tuple[Any, ...], Any], learned: Learned) -> Any:
        norms = {path: each["norm"].astype(self.rest[path].dtype) for path, each in learned.items() if "norm" in each}
        return nnx.merge(self.graph, nnx.State(unflatten_mapping({**self.rest, **norms, **kernels})))


def split(quantized: nnx.Module) -> Student:
    """A module with quantized, or fake-quantized, kernels in parts.

    Raises:
      InputError: there are none.
    """
    graph, state = nnx.split(quantized)
    params = flatten_mapping(nnx.to_pure_dict(state))
    kernels = {path: leaf for path, leaf in params.items() if isinstance(leaf, FakeQuantized)}
    kernels |= {path: FakeQuantized.of(leaf) for path, leaf in params.items() if isinstance(leaf, QTensor)}
    if not kernels:
        raise InputError("There is nothing to tune: the decoder holds no quantized weight.")
    return Student(graph, kernels, {path: leaf for path, leaf in params.items() if path not in kernels})


def begun(student: Student, tuning: Tuning, exact: nnx.Module) -> tuple[Callable[[], Learned], Student]:
    """A function that makes what is learned, and the student that learns it; `exact` is the float module.

    Raises:
      InputError: weights that would begin at float ones of another scaling; levels where no format has them.
    """
    kernels = student.kernels
    if tuning.level_rate and not any(map(_has_levels, kernels.values())):
        raise InputError(f"Tuning's level_rate={tuning.level_rate} learns a codebook, which none of these formats has.")
    floats: Mapping[tuple[Any, ...], Array] = {}
    if tuning.weight_rate:
        kernels = {path: replace(kernel, codes=None) for path, kernel in kernels.items()}
        if tuning.begin == "weights":
            floats = _same_scaling(student, flatten_mapping(nnx.to_pure_dict(nnx.state(exact))))
    return partial(initial, student, tuning, floats), replace(student, kernels=kernels)


def _same_scaling(student: Student, floats: Mapping[tuple[Any, ...], Array]) -> Mapping[tuple[Any, ...], Array]:
    """The float module's kernels; they must be those that were rounded, not scaled into their neighbours."""
    shapes = {
        path: getattr(floats.get(path), "shape", None) == kernel.shape for path, kernel in student.kernels.items()
    }
    same = {path: jnp.array_equal(leaf, floats[path]) for path, leaf in student.rest.items() if path in floats}
    turned = any(kernel.rotations for kernel in student.kernels.values())
    if turned or not all(shapes.values()) or not all(same.values()):
        raise InputError('Tuning with begin="weights" needs weights that no transform scaled, all in one format.')
    return {path: floats[path] for path in student.kernels}


def initial(student: Student, tuning: Tuning, floats: Mapping[tuple[Any, ...], Array]) -> Learned:
    """What is learned, at the start; weights begin at those in `floats`, others at the values of their codes."""
    learned: Learned = {}
    for path, kernel in student.kernels.items():
        learned[path] = {"log_scale": jnp.zeros(kernel.scale.shape, jnp.float32)}
        if kernel.zero is not None and (tuning.weight_rate or not has_integer_zero(kernel.format)):
            learned[path]["shift"] = jnp.zeros(kernel.zero.shape, jnp.float32)
        if tuning.level_rate and _has_levels(kernel):
            shape = np.shape(kernel.format.levels) if kernel.table is None else kernel.table.shape
            learned[path]["level"] = jnp.zeros(shape, jnp.float32)
        if tuning.weight_rate:
            learned[path]["weight"] = _in_steps(kernel, floats.get(path))
    if tuning.norm_rate:
        norms = {path: leaf for path, leaf in student.rest.items() if any("norm" in str(key) for key in path)}
        learned |= {path: {"norm": jnp.array(leaf, jnp.float32)} for path, leaf in norms.items()}
    return learned


def _has_levels(kernel: FakeQuantized) -> bool:
    return isinstance(kernel.format, Codebook) or kernel.table is not None


@jax.jit
def _in_steps(kernel: FakeQuantized, weight: Float[Array, "*l in out"] | None) -> Float[Array, "*l in out"]:
    return (kernel.value() if weight is None else weight.astype(jnp.float32)) / kernel.steps


@jax.jit
def _pack(kernel: FakeQuantized) -> QTensor:
    return kernel.pack()


def block_loss(learned: Learned, frozen: Any, batch: Any, tuning: Tuning) -> Float[Array, ""]:
    """Mean over tokens of the squared error of a block's output over its squared length."""
    (student, rotary), (inputs, outputs) = frozen, batch
    outputs = outputs.astype(jnp.float32)
    predicted = student.module(learned, tuning.compute)(inputs, rotary)[0].astype(jnp.float32)
    return jnp.mean(jnp.sum((predicted - outputs) ** 2, -1) / jnp.maximum(jnp.sum(outputs**2, -1), 1e-12))
