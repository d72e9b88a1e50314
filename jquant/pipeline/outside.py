"""The embedding and the head, which a plan's rules may quantize: ("head", "q8_0"), ("embedding", "q8_0").

On small models they are a third of all bytes. Tied ones are one weight: either name stands for it, and it is stored
once. Their groups run along the model's width. Only methods that look at weights alone suit them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jquant.composition import Choices, Method
from jquant.errors import InputError
from jquant.formats import block_shape, tile_of
from jquant.models.decoder import Decoder
from jquant.models.params import with_params
from jquant.parts import shown
from jquant.pipeline.blocks import round_weight
from jquant.qtensor import QTensor, Transposed
from jquant.rounding.limits import check_scales

EMBEDDING, HEAD = "embedding", "head"
OUTSIDE = (EMBEDDING, HEAD)
PARAMETER = {EMBEDDING: "embedding", HEAD: "head.kernel"}


def outside_choices(decoder: Decoder, methods: Mapping[str, Method | None]) -> Choices:
    """(name, method) of embedding and head where they are quantized; of tied ones under the name "embedding".

    Args:
      decoder: float; its arrays may be abstract.
      methods: for each of OUTSIDE its method, or None.

    Raises:
      InputError: two methods for tied weights; a method that needs calibration, a transform, a rotation, a tuning or
        quantized inputs; groups larger than the model's width; a weight that is quantized already, or not finite.
    """
    chosen = {name: method for name, method in methods.items() if method is not None}
    if decoder.head is None and chosen:
        if len(set(chosen.values())) > 1:
            raise InputError("Embedding and head are one weight of this model: give both the same method.")
        chosen = {EMBEDDING: next(iter(chosen.values()))}
    for name, method in chosen.items():
        _check(name, _matrix(decoder, name), method)
    return tuple(chosen.items())


def quantize_outside(decoder: Decoder, choices: Choices) -> Decoder:
    """The decoder with embedding and head rounded as `outside_choices` returned."""
    rounded: dict[str, Any] = {}
    for name, method in choices:
        w = _matrix(decoder, name)
        q, _, fits = round_weight(w, {}, chosen=method)
        if not fits:
            raise InputError(f"{name}: {shown(method.rounding)} chose codes beyond those of the format.")
        check_scales({name: q}, {name: w})
        rounded[PARAMETER[name]] = Transposed(q) if name == EMBEDDING else q
    return with_params(decoder, rounded)


def _matrix(decoder: Decoder, name: str) -> Any:
    """The weight `[width, vocab]`; a QTensor if it is quantized."""
    if name == HEAD:
        assert decoder.head is not None
        return decoder.head.kernel.get_value()
    embedding = decoder.embedding.get_value()
    if isinstance(embedding, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(embedding.shape[::-1], embedding.dtype)
    return embedding.T


def _check(name: str, weight: Any, method: Method) -> None:
    if isinstance(weight, QTensor):
        raise InputError(f"{name} is quantized already: quantize the float model.")
    alone = replace(method, activation=None, transform=None, rotation=None, incoherence=None, tuning=())
    several = tile_of(method.format)[1] > 1
    if method != alone or method.needs_calibration or method.error_propagation or several:
        raise InputError(
            f"{name}: {shown(method)} does more than look at the weight: take a method such as 'q8_0', 'int8' or 'nf4'."
        )
    try:
        block_shape(method.format, weight.shape)
    except InputError as wrong:
        raise InputError(f"{name}: {wrong}") from None
    if isinstance(weight, jax.Array) and not jnp.all(jnp.isfinite(weight)):
        raise InputError(f"{name} holds NaN or infinite values.")
