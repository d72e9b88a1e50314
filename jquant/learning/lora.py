"""QLoRA: low-rank adapters learned over a frozen, quantized model (arXiv 2305.14314).

    model = jquant.add_adapters(jquant.quantize(model, "nf4_double"), jquant.LoRA(rank=16, alpha=32))
    model = jquant.train_adapters(model, tokens, jquant.Tuning(steps=200, rate=2e-4, text=1.0))

A step dequantizes a weight to bfloat16 where a product reads it, as in the paper. Gradients and the optimizer's moments
are those of the adapters alone. What the model then computes, and what PEFT's files hold, is `models.adapters.Adapted`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.traversals import flatten_mapping, unflatten_mapping
from jax import Array
from jaxtyping import Float, Int, Key

from jquant.composition import Tuning
from jquant.data import check_whole, run_hashes
from jquant.errors import InputError
from jquant.io.language_model import LanguageModel
from jquant.learning.journal import Journal, opened
from jquant.learning.loop import Learned, Task, fit, optimizer
from jquant.learning.losses import Product, computing, model_loss
from jquant.learning.teacher import batches_of, check_top_k
from jquant.learning.tuning import check_devices, check_teacher, check_windows, run_of
from jquant.methods import decide
from jquant.models.adapters import Adapted, LoRA, first_adapted, values_of
from jquant.models.decoder import Block, Decoder, blocks, outside_of, with_blocks
from jquant.models.families import family_of
from jquant.models.params import flat_params, weight_name, with_params
from jquant.parallel.mesh import Devices
from jquant.parts import shown
from jquant.progress import Progress, showing
from jquant.qtensor import QTensor, dequantize
from jquant.report import Report

# Rules that give weights different adapters: the first regex found in a weight's name decides.
AdapterRules = Sequence[tuple[str, "LoRA | None"]]
Pair = tuple[Float[Array, "in rank"], Float[Array, "rank out"]]


def add_adapters(
    model: LanguageModel, rules: LoRA | AdapterRules, float_model: LanguageModel | None = None, *, seed: int = 0
) -> LanguageModel:
    """A model whose projections have adapters that are not trained yet.

    Args:
      model: quantized or float; left untouched.
      rules: one adapter for all projections, or rules (regex, LoRA or None) as of `quantize`, e.g.
        `[(r"attention", LoRA(16)), (r"mlp", LoRA(8, alpha=16))]`. Weights that no rule matches have none.
      float_model: the model that the quantized one was made from; needed by `start="loftq"`.
      seed: of the values of a.

    Raises:
      InputError: no LoRA or rules; a rule that is no regex, or decides for no weight; a rank above a weight's smaller
        side; adapters of different dropout, which PEFT's files can't hold; a model with adapters; LoftQ for a weight
        that is not quantized, without the float model, or with one that has other norms or rotations.
    """
    check_whole(0, seed=seed)
    decoder, weights = model.decoder, family_of(model.config).weights
    choices = _choices(rules, [weight_name(layer, path) for layer in range(model.config.layers) for path in weights])
    exact = _float_blocks(model, float_model) if any(c and c.start == "loftq" for c in choices.values()) else None
    layers = []
    for layer, block in enumerate(blocks(decoder)):
        params = flat_params(block)
        if name := first_adapted(params):
            raise InputError(f"{weight_name(layer, name)} has an adapter already: merge_adapters(model) first.")
        floats = None if exact is None else _float_params(next(exact), block, layer)
        adapted = {}
        for position, path in enumerate(weights):
            name = weight_name(layer, path)
            if (lora := choices[name]) is None:
                continue
            _check_rank(name, lora.rank, params[path].shape)
            if lora.start == "loftq" and floats is not None:
                adapted[path] = _loftq(name, floats[path], params[path], lora)
            else:
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), layer), position)
                adapted[path] = _zero(params[path], lora, key)
        layers.append(with_params(block, adapted))
    return replace(model, decoder=with_blocks(decoder, layers))


def train_adapters(
    model: LanguageModel,
    tokens: Int[np.ndarray, "n context"],
    tuning: Tuning,
    teacher: LanguageModel | None = None,
    *,
    journal: Journal | None = None,
    devices: Devices | None = None,
    progress: Progress | bool = True,
) -> LanguageModel:
    """The model with adapters learned on a text; every other parameter stays as it is, bit for bit.

    Args:
      model: with adapters (`add_adapters`, `load_adapters`); left untouched.
      tokens: training windows. The result's `calibrated_on` holds them, so `perplexity` refuses this text.
      tuning: a stage with target "model". `rate` is the rate of a and b. `text=1` learns the text's cross-entropy; the
        rest is the KL divergence from the teacher. `seed` is of the windows' order and of dropout.
      teacher: what to learn from if `text` is below 1; with the model's embedding and head.
      journal: see `tune`.
      devices: see `tune`.
      progress: see `tune`.

    Raises:
      InputError: no adapter; windows that the model can't read; a tuning with target "block", weight_rate,
        norm_rate, level_rate or a top_k not below the vocabulary;
        no teacher or one with another embedding or head; a step whose loss or parameters are not finite.
    """
    _check_training(model, tokens, tuning, teacher)
    check_devices(tuning, devices)
    student, learned = split(model.decoder)
    start = partial(jax.tree.map, jnp.array, learned)  # copies, because a step donates its state
    (count, context), packed = tokens.shape, partial(_with_learned, model.decoder)
    with showing(progress) as tell, opened(journal, partial(_run, model, teacher, tokens, tuning, devices)) as writer:
        exact, batch_of = batches_of(teacher.decoder if teacher else outside_of(model.decoder), tokens, tuning, tell)

        def batch(number: int, which: Int[np.ndarray, " windows"]) -> tuple[Any, ...]:
            step_key = jax.random.fold_in(jax.random.key(tuning.seed), number)
            return batch_of(which), jax.random.key_data(jax.random.split(step_key, tuning.windows))

        frozen = (student, exact)
        task = Task("Training of adapters", start, adapter_loss, frozen, batch, count, context, packed, devices)
        learned = fit(task, tuning, writer, tell)
    seen = run_hashes(tokens) if model.calibrated_on is None else np.union1d(model.calibrated_on, run_hashes(tokens))
    return replace(model, decoder=_with_learned(model.decoder, learned), calibrated_on=seen)


def _run(
    model: LanguageModel,
    teacher: LanguageModel | None,
    tokens: np.ndarray,
    tuning: Tuning,
    devices: Devices | None,
) -> dict[str, Any]:
    """What decides the bytes of a training's result."""
    modules = {"model": model.decoder, "teacher": teacher and teacher.decoder}
    return run_of(modules, tokens, tuning, devices, __name__)


def merge_adapters(model: LanguageModel) -> LanguageModel:
    """A float model: every projection dequantized, plus (alpha / rank) · a @ b where it has an adapter.

    It is in the dtype of the embedding. Inputs that the quantized model rounds (`QTensor.activation`) are not rounded.

    Raises:
      InputError: the model has no adapter.
    """
    _check_adapted(model)
    dtype = model.decoder.dtype
    layers = []
    for block in blocks(model.decoder):
        kernels = {path: leaf for path, leaf in flat_params(block).items() if path.endswith("kernel")}
        layers.append(with_params(block, {path: values_of(leaf).astype(dtype) for path, leaf in kernels.items()}))
    stored_as = f"{model.stored_as}, merged with adapters"
    return replace(model, decoder=with_blocks(model.decoder, layers), report=Report(), stored_as=stored_as)


def optimizer_bytes(model: LanguageModel, tuning: Tuning) -> int:
    """Bytes of the optimizer's state while `train_adapters` runs: its moments are those of the adapters alone."""
    moments = jax.eval_shape(optimizer(tuning).init, split(model.decoder)[1])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(moments))


# ---- training --------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Student:
    """A decoder with adapters in parts: its structure, its adapted kernels without a and b, and the rest.

    Attributes:
      graph: the decoder's structure (static).
      kernels: path -> `Adapted`.
      rest: path -> array or QTensor.
      keys: the step's key for each window; None leaves dropout off.
    """

    graph: Any = field(metadata={"static": True})
    kernels: Any
    rest: Any
    keys: Any = None

    def module(self, learned: Learned, compute: str = "float32") -> Any:
        """The decoder under what is learned; the frozen projections' products have factors in `compute`."""
        kernels = {}
        for number, (path, kernel) in enumerate(sorted(self.kernels.items())):
            base, keys = Product(kernel.base, compute), self._keys_of(number, kernel)
            kernels[path] = replace(kernel, base=base, **learned[path], keys=keys)
        return nnx.merge(self.graph, nnx.State(unflatten_mapping({**computing(self.rest, compute), **kernels})))

    def _keys_of(self, number: int, kernel: Adapted) -> Key[Array, "l windows"] | None:
        """The keys of a stack of kernels, counted from 0: different in each layer and for each window."""
        if self.keys is None or not kernel.dropout:
            return None
        layers = kernel.shape[0]
        return jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, number), layers), out_axes=1)(self.keys)


def split(decoder: Decoder) -> tuple[Student, Learned]:
    """A decoder in parts, and its adapters' a and b."""
    graph, state = nnx.split(decoder)
    kernels, learned, rest = {}, {}, {}
    for path, leaf in flatten_mapping(nnx.to_pure_dict(state)).items():
        if isinstance(leaf, Adapted):
            kernels[path] = replace(leaf, a=None, b=None)
            learned[path] = {"a": leaf.a, "b": leaf.b}
        else:
            rest[path] = leaf
    return Student(graph, kernels, rest), learned


def adapter_loss(learned: Learned, frozen: Any, batch: Any, tuning: Tuning) -> Float[Array, ""]:
    """`model_loss` with dropout; a batch is its batch of windows, and a key for each window."""
    (student, teacher), (windows, keys) = frozen, batch
    return model_loss(learned, (replace(student, keys=jax.random.wrap_key_data(keys)), teacher), windows, tuning)


def _with_learned(decoder: Decoder, learned: Learned) -> Decoder:
    kernels = {".".join(map(str, path)): pair for path, pair in learned.items()}
    params = flat_params(decoder)
    return with_params(decoder, {name: replace(params[name], **pair) for name, pair in kernels.items()})


def _check_training(model: LanguageModel, tokens: Any, tuning: Tuning, teacher: LanguageModel | None) -> None:
    _check_adapted(model)
    check_windows(tokens, model.config)
    if tuning.target != "model" or tuning.weight_rate or tuning.norm_rate or tuning.level_rate:
        raise InputError(
            'Adapters are learned through the whole model, and nothing else is: target is "model", weight_rate, '
            "norm_rate and level_rate are 0."
        )
    if tuning.text == 1:
        return
    if teacher is None:
        raise InputError(f"text={tuning.text} learns from a teacher: give one, or text=1 for the text alone.")
    if name := first_adapted(flat_params(teacher.decoder)):
        raise InputError(f"The teacher's {name} has an adapter: give what merge_adapters(teacher) returns.")
    check_teacher(model.decoder, teacher.decoder)
    check_top_k(tuning, model.config)


def _check_adapted(model: LanguageModel) -> None:
    if first_adapted(flat_params(model.decoder)) is None:
        raise InputError(f"{model.name} has no adapter: add_adapters(model, LoRA(…)) gives it some.")


# ---- starts ----------------------------------------------------------------------------------------------------------


def _choices(rules: Any, names: list[str]) -> dict[str, LoRA | None]:
    """The adapter of each weight."""
    if isinstance(rules, LoRA):
        return dict.fromkeys(names, rules)
    if not isinstance(rules, list | tuple):
        raise InputError(f"{shown(rules)} is no adapter: give LoRA(…) or rules (regex, LoRA).")
    for rule in rules:
        fits = isinstance(rule, list | tuple) and len(rule) == 2 and isinstance(rule[0], str)
        if not fits or not isinstance(rule[1], LoRA | None):
            raise InputError(f"A rule for adapters is a pair (regex, LoRA or None), not {shown(rule)}.")
    choices = decide(rules, names)
    if not any(choices.values()):
        raise InputError("The rules give no weight an adapter.")
    if len(shares := {lora.dropout for lora in choices.values() if lora}) > 1:
        raise InputError(f"A model's adapters share a dropout, because PEFT's files hold one: not {sorted(shares)}.")
    return choices


def _check_rank(name: str, rank: int, shape: tuple[int, ...]) -> None:
    if rank > min(shape):
        raise InputError(f"{name} is {shape[0]} × {shape[1]}: its adapter's rank is at most {min(shape)}, not {rank}.")


def _zero(base: Any, lora: LoRA, key: Key[Array, ""]) -> Adapted:
    """PEFT's start: a from kaiming_uniform_(a=√5), which is uniform within ±1/√in; b is 0."""
    rows, columns = base.shape
    a = jax.random.uniform(key, (rows, lora.rank), minval=-(rows**-0.5), maxval=rows**-0.5)
    return Adapted(base, a, jnp.zeros((lora.rank, columns)), lora.alpha, lora.dropout)


def _loftq(name: str, w: Float[Array, "in out"], base: Any, lora: LoRA) -> Adapted:
    """LoftQ's start (arXiv 2310.08659, Algorithm 1), T = 1: the quantization at hand, which stays as it is."""
    if not isinstance(base, QTensor):
        raise InputError(f'{name} is not quantized, so start="loftq" has no error to make up for.')
    a, b = low_rank_error(w, base, lora)
    return Adapted(base, a, b, lora.alpha, lora.dropout)


@partial(jax.jit, static_argnames="lora")
def low_rank_error(w: Float[Array, "in out"], q: QTensor, lora: LoRA) -> Pair:
    """The a and b whose (alpha / rank) · a @ b is nearest to W − Q in Frobenius norm.

    Both have the square roots of the singular values (arXiv 2310.08659, Eq. 9), here over the adapter's strength.
    """
    u, s, vt = jnp.linalg.svd(w.astype(jnp.float32) - dequantize(q), full_matrices=False)
    root = jnp.sqrt(s[: lora.rank] * (lora.rank / lora.alpha))
    return u[:, : lora.rank] * root, root[:, None] * vt[: lora.rank]


def _float_blocks(model: LanguageModel, float_model: LanguageModel | None) -> Iterator[Block]:
    if float_model is None:
        raise InputError('start="loftq" makes up for the error of quantization: give it the float_model.')
    if float_model.config != model.config or float_model.decoder.norm.rotation != model.decoder.norm.rotation:
        raise InputError("The float model has another configuration or rotation than the quantized one.")
    return blocks(float_model.decoder)


def _float_params(exact: Block, block: Block, layer: int) -> dict[str, Any]:
    """The float weights behind a quantized block.

    Raises:
      InputError: one is not float; the block was transformed before it was quantized.
    """
    floats, params = flat_params(exact), flat_params(block)
    norms = [path for path in params if path.endswith("scale")]
    if exact.mlp.rotation != block.mlp.rotation or not all(np.array_equal(floats[p], params[p]) for p in norms):
        raise InputError(
            f"layers.{layer} has other norms or another rotation in the float model: LoftQ compares weights, so it "
            f"takes methods without a transform."
        )
    for path, leaf in floats.items():
        if isinstance(leaf, QTensor | Adapted):
            raise InputError(f"The float model's {weight_name(layer, path)} is not float.")
    return floats
