"""What is done to each weight of a decoder, decided once before any work."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jquant.composition import Choices, Method, Tuning, needs_of
from jquant.errors import InputError
from jquant.formats import block_shape
from jquant.methods import Rules, assign
from jquant.models.adapters import Adapted
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder
from jquant.models.families import absorbs, family_of
from jquant.models.params import Params, flat_params, weight_name
from jquant.pipeline.outside import OUTSIDE, outside_choices
from jquant.qtensor import QTensor
from jquant.transforms import Hadamard


@dataclass(frozen=True)
class Plan:
    """The methods of every layer's weights.

    Attributes:
      layers: for each layer, (path within the block, method) of every weight to quantize.
      outside: (name, method) of embedding and head, if they are quantized (`pipeline.outside`).
    """

    layers: tuple[Choices, ...]
    outside: Choices = ()

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        """The different methods of the layers."""
        return tuple(dict.fromkeys(method for layer in self.layers for _, method in layer))

    @cached_property
    def needs(self) -> frozenset[str]:
        """What calibration must provide (`Method.needs`)."""
        return needs_of(self.methods)

    @cached_property
    def observes(self) -> tuple[bool, ...]:
        """For each layer, whether calibration windows must reach it."""
        return tuple(bool(needs_of(method for _, method in layer) - {"text"}) for layer in self.layers)

    @property
    def rotation(self) -> Hadamard | None:
        """How the decoder is rotated first; the same for all weights."""
        return self.methods[0].rotation if self.methods else None

    def tuning(self, target: str) -> list[Tuning]:
        """The stages of learning after rounding with a target, "block" or "model"; the same for all weights."""
        return [stage for stage in self.methods[0].tuning if stage.target == target] if self.methods else []

    def whole_model(self) -> Iterator[tuple[str, str]]:
        """(weight, part) for every part of a weight's method that takes gradients through the whole model."""
        for layer, choices in enumerate(self.layers):
            for path, method in choices:
                parts = {
                    "token_weights='loss'": method.loss_gradient is not None,
                    "a Gram matrix of the outputs": "output_gram" in method.needs,
                    "LossSearch": "clips" in method.needs,
                    "Tuning with target='model'": any(stage.target == "model" for stage in method.tuning),
                }
                yield from ((weight_name(layer, path), part) for part, used in parts.items() if used)

    @property
    def streams(self) -> bool:
        """Whether blocks suffice: no part needs the whole model in memory."""
        return next(self.whole_model(), None) is None


def joined(plans: Iterable[Plan]) -> Plan:
    """The plan that shared statistics must serve: for every weight the methods of all plans, each once."""
    layers = zip(*(plan.layers for plan in plans), strict=True)
    return Plan(tuple(tuple(dict.fromkeys(choice for choices in layer for choice in choices)) for layer in layers))


def make_plan(decoder: Decoder, method: "str | Method | Rules | Plan") -> Plan:
    """Checks that a method, or rules, suit a decoder, and makes the plan.

    Args:
      decoder: float; its arrays may be abstract, for a model on disk.
      method: a name, a `Method`, or rules; a `Plan` made for the same decoder is returned as it is.

    Raises:
      InputError: no method or rules (`methods.complete`); a rule that names no weight; an embedding or a head that
        can't be quantized so (`pipeline.outside`); a weight smaller than its
        method's groups, or with NaN or infinite values; a decoder that is quantized already; projections that read one
        input and do not share a transform; a transform with a `LossSearch`; methods that do not
        share tuning or rotation; a plan with another number of layers.
    """
    if isinstance(method, Plan):
        if len(method.layers) != decoder.config.layers:
            raise InputError(f"The plan has {len(method.layers)} layers; the decoder has {decoder.config.layers}.")
        return method
    family = family_of(decoder.config)
    names = [weight_name(layer, path) for layer in range(decoder.config.layers) for path in family.weights]
    methods = assign(method, names, OUTSIDE)
    rotated = [
        segment.mlp.rotation is not None
        for segment in decoder.segments
        for _ in range(segment.mlp.down.kernel.get_value().shape[0])
    ]
    layers = []
    for layer, params in enumerate(_shapes(decoder)):
        choices = {path: methods[weight_name(layer, path)] for path in family.weights}
        for path, chosen in choices.items():
            _check_weight(weight_name(layer, path), params[path], chosen)
        layers.append(tuple((path, chosen) for path, chosen in choices.items() if chosen is not None))
        _check_layer(layer, dict(layers[-1]), decoder.config, rotated[layer])
    plan = Plan(tuple(layers), outside_choices(decoder, {name: methods[name] for name in OUTSIDE}))
    if len({method.tuning for method in plan.methods}) > 1:
        raise InputError("A plan's weights are tuned together: give its methods the same tuning.")
    if len({method.rotation for method in plan.methods}) > 1:
        raise InputError("A plan's weights are rotated together: give its methods the same rotation.")
    if isinstance(decoder.embedding.get_value(), Array):  # abstract arrays have no values to check
        _check_finite(decoder, plan.layers)
    return plan


def _check_weight(name: str, weight: jax.ShapeDtypeStruct | QTensor | Adapted, method: Method | None) -> None:
    if isinstance(weight, Adapted):
        raise InputError(f"{name} has an adapter: quantize what merge_adapters(model) returns.")
    if isinstance(weight, QTensor):
        raise InputError(f"{name} is quantized already: quantize the float model.")
    if method is None:
        return
    if method.transform is not None and "clips" in method.needs:
        raise InputError(f"{name}: LossSearch learns on untransformed weights; leave one out.")
    *lead, out = weight.shape
    if out % method.output_groups:
        raise InputError(f"{name}: its {out} outputs do not divide into {method.output_groups} groups of one size.")
    try:
        block_shape(method.format, (*lead, out // method.output_groups))
    except InputError as wrong:
        raise InputError(f"{name}: {wrong}") from None


def _check_layer(layer: int, methods: dict[str, Method], config: DecoderConfig, rotated: bool) -> None:
    for site in family_of(config).sites:
        if len({method.transform for path, method in methods.items() if path in site.weights}) > 1:
            readers = ", ".join(site.weights)
            raise InputError(f"layers.{layer}: {readers} read one input, so they must share a transform.")
        for path in site.weights if not absorbs(site, config) else ():
            if (chosen := methods.get(path)) is not None and chosen.transform is not None:
                raise InputError(
                    f"{weight_name(layer, path)} reads what {config.activation} makes, and no scale passes through "
                    f"that into {site.producer}: leave its transform out by a rule, such as "
                    f'[("{path.removesuffix(".kernel")}", "gptq"), ("", …)].'
                )
    if (down := methods.get("mlp.down.kernel")) is None or down.transform is None:
        return
    if rotated or (down.rotation is not None and down.rotation.mlp):
        raise InputError(
            f"layers.{layer}.mlp.down.kernel reads rotated inputs, so no scale folds into mlp.up: leave its "
            f"transform out, or rotate with mlp=False."
        )


def _check_finite(decoder: Decoder, layers: Sequence[Choices]) -> None:
    """Raises InputError for a weight to be quantized that holds NaN or infinite values."""
    first = 0
    for segment in decoder.segments:
        stack = flat_params(segment)
        for path, finite in jax.device_get(_finite(stack)).items():
            for layer in map(int, first + np.flatnonzero(~finite)):
                if path in dict(layers[layer]):
                    raise InputError(f"{weight_name(layer, path)} holds NaN or infinite values.")
        first += jax.tree.leaves(stack)[0].shape[0]


@jax.jit
def _finite(stack: Params) -> dict[str, Array]:
    """For each stacked parameter, whether each layer's values are all finite."""
    return {path: jnp.all(jnp.isfinite(leaf), tuple(range(1, leaf.ndim))) for path, leaf in stack.items()}


def _shapes(decoder: Decoder) -> Iterator[Params]:
    """Every layer's parameters as shapes."""
    for segment in decoder.segments:
        stack = flat_params(segment)
        layer = jax.eval_shape(lambda stack: jax.tree.map(itemgetter(0), stack), stack)
        yield from [layer] * jax.tree.leaves(stack)[0].shape[0]
